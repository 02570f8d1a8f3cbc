# Sourced by quickstart.sh and test.sh, from the checkout's root: makes .venv and installs into it what is missing.
#
#   source scripts/setup.sh; set_up requirements.txt [requirements-dev.txt ...]     then run "$PYTHON"
#   set_up_beside requirements-transformers4.txt      into .venv/transformers4, for PYTHONPATH: an older version of a package
#
# Needs Python 3.11 or newer with venv and pip, nothing else. A requirements file is installed once: its hash is kept
# in .venv and a second call takes a tenth of a second. MINIMOE_PYTHON=python3 uses that interpreter as it is, with
# nothing installed: for a GPU machine whose system Python has torch already.

# The one place for environment variables of every command that the scripts start.
export PYTHONUNBUFFERED=1
export PIP_DISABLE_PIP_VERSION_CHECK=1

# train MODULE CONFIG: without an NVIDIA card, a process for each of the first two cores, one thread each: that is faster
# than one process with two threads (docs/results.md), and far faster on a busy machine. With a card, one process.
train() {
    if [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        OMP_NUM_THREADS=1 run_child "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m "$@" train.threads=1
    else
        run_child "$PYTHON" -m "$@"
    fi
}

child_file="" # while run_child runs a command, this file (if named) holds its process id

run_child() { # COMMAND...
    if [ -z "$child_file" ]; then
        "$@"
        return
    fi
    local code=0
    sh -c 'echo $$ >"$0"; exec "$@"' "$child_file" "$@" || code=$?
    : >"$child_file"
    return $code
}

find_python() { # prints the first interpreter that is new enough
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python of version 3.11 or newer was found; install one (Debian: apt-get install python3.11-venv)" >&2
    return 1
}

make_environment() {
    local base
    base=$(find_python) || return 1
    echo "making .venv with $("$base" --version)"
    # --clear: what an interrupted attempt or a removed interpreter left behind does not get in the way.
    run_child "$base" -m venv --clear .venv && return
    rm -rf .venv
    echo "error: $base -m venv failed; install its venv module (Debian: apt-get install python3-venv)" >&2
    return 1
}

set_up() { # FILE...: sets PYTHON
    if [ -n "${MINIMOE_PYTHON:-}" ]; then
        PYTHON=$MINIMOE_PYTHON
        "$PYTHON" -c 'import torch' 2>/dev/null && return
        echo "error: MINIMOE_PYTHON=$PYTHON cannot import torch; unset MINIMOE_PYTHON to use .venv instead" >&2
        return 1
    fi
    PYTHON=.venv/bin/python
    "$PYTHON" -m pip --version >/dev/null 2>&1 || make_environment || return 1
    local file stamp hash
    for file in "$@"; do
        stamp=.venv/installed-$file
        hash=$("$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
            continue
        fi
        echo "installing $file into .venv (torch alone can take some minutes)"
        if ! run_child "$PYTHON" -m pip install --quiet -r "$file"; then
            echo "error: pip could not install $file; mend what it says above and run the command again" >&2
            return 1
        fi
        echo "$hash" >"$stamp"
    done
}

set_up_beside() { # FILE: requirements-NAME.txt into .venv/NAME, without what those packages ask for (.venv has it)
    local file=$1 folder hash
    if [ -n "${MINIMOE_PYTHON:-}" ]; then return; fi # nothing is installed there
    folder=.venv/${file#requirements-}
    folder=${folder%.txt}
    hash=$("$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
    if [ -f "$folder/installed" ] && [ "$(cat "$folder/installed")" = "$hash" ]; then
        return
    fi
    echo "installing $file into $folder"
    rm -rf "$folder" && mkdir "$folder"
    if ! run_child "$PYTHON" -m pip install --quiet --no-deps --target "$folder" -r "$file"; then
        echo "error: pip could not install $file; mend what it says above and run the command again" >&2
        return 1
    fi
    echo "$hash" >"$folder/installed"
}
