#!/usr/bin/env bash
# From nothing to a chatting Mixture-of-Experts model on embedded text: no account, no hub, no GPU needed.
#
#   bash scripts/quickstart.sh
#
# Interrupt it anywhere and run it again: every stage goes on where it was, and what is done is not done twice.
# The seconds of each stage, added up over all calls, are kept in runs/quickstart-stages.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIGS=configs/quickstart
PRETRAIN=runs/quickstart-pretrain
SFT=runs/quickstart-sft
TIMES=runs/quickstart-stages.json
source scripts/setup.sh

mkdir -p runs
child_file=$(mktemp)
current=""     # the stage under way
began=0        # $SECONDS when it began
interrupted="" # not empty after Ctrl-C
finished=""    # not empty once all is done

human() { # SECONDS
    if [ "$1" -lt 60 ]; then echo "$1 s"; else echo "$(($1 / 60)) min $(($1 % 60)) s"; fi
}

record() { # adds the current stage's seconds to TIMES, in one rename
    if [ -z "$current" ] || [ ! -x "$(command -v "${PYTHON:-}")" ]; then return 0; fi
    "$PYTHON" - "$TIMES" "$current" "$((SECONDS - began))" <<'PY'
import json, os, sys
path, stage, seconds = sys.argv[1:]
times = json.load(open(path)) if os.path.exists(path) else {}
times[stage] = times.get(stage, 0) + int(seconds)
with open(path + ".tmp", "w") as file:
    json.dump(times, file, indent=1)
os.replace(path + ".tmp", path)
PY
}

gone() { # PROCESS SECONDS: waits so long at most
    for _ in $(seq $(($2 * 10))); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    return 1
}

leave() { # at every exit: no child stays behind, and the time of a broken-off stage is kept
    local child
    child=$(cat "$child_file" 2>/dev/null || true)
    # What stopped this script has often stopped the child too (timeout, a closed terminal): it then finishes its step and
    # saves, and a second signal would cut that off.
    if [ -n "$child" ] && ! gone "$child" 5; then
        kill -TERM "$child" 2>/dev/null || true
        gone "$child" 60 || kill -KILL "$child" 2>/dev/null || true
    fi
    rm -f "$child_file"
    record
    if [ -z "$finished" ]; then
        echo "stopped${current:+ in stage $current}; the same command goes on from here: bash scripts/quickstart.sh" >&2
    fi
}
trap leave EXIT
trap 'interrupted=1' INT # Ctrl-C reaches the running command too; it may save and leave with success

stage() { # NAME COMMAND...: runs one stage and prints its time
    current=$1
    began=$SECONDS
    shift
    local code=0
    printf '\n== %s: %s\n' "$current" "$*"
    if declare -F "$1" >/dev/null; then "$@" || code=$?; else run_child "$@" || code=$?; fi
    if [ -n "$interrupted" ]; then exit 130; fi
    if [ "$code" -ne 0 ]; then exit "$code"; fi
    echo "== $current took $(human $((SECONDS - began)))"
    record
    current=""
}

evaluate() { # RUN: unless its evaluation is newer than every checkpoint
    local newer=""
    if [ -f "$1/evaluation.json" ]; then
        newer=$(find "$1/checkpoints" -name model.safetensors -newer "$1/evaluation.json" | head -n 1)
        if [ -z "$newer" ]; then
            echo "$1/evaluation.json is up to date"
            return
        fi
    fi
    run_child "$PYTHON" -m eval.evaluate "$1"
}

report() {
    cp "$TIMES" "$PRETRAIN/stages.json" && cp "$TIMES" "$SFT/stages.json" && run_child "$PYTHON" -m eval.report "$SFT"
}

stage setup set_up requirements.txt
stage tokenizer "$PYTHON" -m scripts.train_tokenizer "$CONFIGS/tokenizer.yaml"
stage prepare-pretrain "$PYTHON" -m scripts.prepare_data "$CONFIGS/pretrain.yaml"
stage pretrain train train.pretrain "$CONFIGS/pretrain.yaml"
stage prepare-sft "$PYTHON" -m scripts.prepare_data "$CONFIGS/sft.yaml"
stage sft train train.sft "$CONFIGS/sft.yaml"
stage evaluate-pretrain evaluate "$PRETRAIN"
stage evaluate-sft evaluate "$SFT"
stage report report

printf '\n'
"$PYTHON" - "$TIMES" <<'PY'
import json, sys
times = json.load(open(sys.argv[1]))
for stage, seconds in times.items():
    print(f"{stage:<18}{seconds // 60:>4} min {seconds % 60:>2} s")
after = sum(times.values()) - times.get("setup", 0)
print(f"{'after set-up':<18}{after // 60:>4} min {after % 60:>2} s in all, over every call of this script")
PY
finished=1
cat <<END
this call: $(human $SECONDS)
report:    $SFT/report.html
chat:      $PYTHON -m scripts.chat $SFT
END
