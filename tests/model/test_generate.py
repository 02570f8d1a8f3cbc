"""Generation: the cache changes nothing, neither does the batch; sampling options by their properties."""

import math

import pytest
import torch
from torch import nn

from model import generate as generate_module
from model.generate import generate, stream

MODELS = {
    "default": {},
    "dense": {"n_routed_experts": 0},
    "sigmoid, QK-norm": {"scoring_func": "sigmoid", "use_qk_norm": True},
}
PROMPTS = [[5, 3, 60], [1], [7, 7, 7, 0, 2, 9, 31], [0, 0]]


@pytest.fixture(params=list(MODELS))
def wide_model(request, tiny_model):
    return tiny_model(dtype=torch.float64, tie_word_embeddings=False, **MODELS[request.param]).eval()


def greedy_without_cache(model, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class FixedHead(nn.Module):
    """The same logits for every hidden state: what is sampled then depends on the options alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


@pytest.fixture
def fixed(tiny_model):
    """fixed(first logits) -> a model that always says these, the rest of the vocabulary being impossible."""

    def make(logits: list[float]):
        model = tiny_model(num_hidden_layers=1).eval()
        padding = [-1e4] * (model.config.vocab_size - len(logits))
        model.lm_head = FixedHead(torch.tensor([*logits, *padding]))
        return model

    return make


def frequencies(model, n: int = 4000, **options) -> list[float]:
    """How often each of the first four tokens is drawn, over many independent draws."""
    drawn = [t for row in generate(model, [[60]] * 100, max_new_tokens=n // 100, **options) for t in row]
    assert len(drawn) == n
    return [drawn.count(token) / n for token in range(4)]


PROBABILITIES = [0.4, 0.3, 0.2, 0.1]
LOGITS = [math.log(p) for p in PROBABILITIES]


def test_greedy_with_cache_is_greedy_without(wide_model):
    said = set()
    for prompt in PROMPTS:
        expected = greedy_without_cache(wide_model, prompt, 12)
        assert generate(wide_model, [prompt], max_new_tokens=12, temperature=0) == [expected]
        said.update(expected)
    assert len(said) > 5, "a model that repeats itself would prove little"


def test_a_ragged_batch_is_its_prompts_one_by_one(wide_model):
    together = generate(wide_model, PROMPTS, max_new_tokens=12, temperature=0)
    assert together == [generate(wide_model, [prompt], max_new_tokens=12, temperature=0)[0] for prompt in PROMPTS]
    penalised = generate(wide_model, PROMPTS, max_new_tokens=12, temperature=0, repetition_penalty=1.5)
    alone = [generate(wide_model, [p], max_new_tokens=12, temperature=0, repetition_penalty=1.5)[0] for p in PROMPTS]
    assert penalised == alone != together


def test_a_stream_is_a_generation(wide_model):
    for options in ({"temperature": 0}, {"seed": 3, "top_k": 20}, {"seed": 4, "top_p": 0.9, "repetition_penalty": 1.2}):
        whole = generate(wide_model, [PROMPTS[2]], max_new_tokens=10, **options)[0]
        assert list(stream(wide_model, PROMPTS[2], max_new_tokens=10, **options)) == whole


def test_a_stop_token_ends_its_row_alone(wide_model):
    free = generate(wide_model, PROMPTS, max_new_tokens=12, temperature=0)
    stop = {free[0][4], free[1][7]}
    stopped = generate(wide_model, PROMPTS, max_new_tokens=12, temperature=0, stop_ids=stop)
    for whole, cut in zip(free, stopped, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stop), len(whole))
        assert cut == whole[:end], "up to the first stop token, which is left out"
    assert len(stopped[0]) <= 4
    assert list(stream(wide_model, PROMPTS[0], max_new_tokens=12, temperature=0, stop_ids=stop)) == stopped[0]


def test_generation_ends_when_every_row_has(fixed, monkeypatch):
    model = fixed([5.0])
    steps = []
    hidden_states = model._hidden_states
    monkeypatch.setattr(model, "_hidden_states", lambda *args: steps.append(1) or hidden_states(*args))
    assert generate(model, [[1], [2, 3]], max_new_tokens=50, temperature=0, stop_ids={0}) == [[], []]
    assert len(steps) == 1


def test_the_context_is_the_end(tiny_model):
    model = tiny_model(max_position_embeddings=16).eval()
    assert [len(row) for row in generate(model, [[1] * 10, [2] * 3], max_new_tokens=100, temperature=0)] == [6, 6]
    assert len(generate(model, [[1] * 15], max_new_tokens=100)[0]) == 1
    assert generate(model, [], max_new_tokens=5) == []


def test_draws_follow_the_probabilities(fixed):
    for temperature in (1.0, 0.5, 2.0):
        weights = [p ** (1 / temperature) for p in PROBABILITIES]
        found = frequencies(fixed(LOGITS), temperature=temperature)
        expected = [w / sum(weights) for w in weights]
        assert found == pytest.approx(expected, abs=0.03), f"temperature {temperature}"  # 4 standard errors


def test_top_k_keeps_the_k_best_and_their_proportions(fixed):
    assert frequencies(fixed(LOGITS), top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.03)
    assert frequencies(fixed(LOGITS), top_k=1) == [1, 0, 0, 0]
    assert frequencies(fixed(LOGITS), top_k=1000) == pytest.approx(PROBABILITIES, abs=0.03)


def test_top_p_keeps_the_fewest_that_hold_p(fixed):
    shuffled = fixed([LOGITS[2], LOGITS[0], LOGITS[3], LOGITS[1]])  # 0.2, 0.4, 0.1, 0.3
    assert frequencies(shuffled, top_p=0.35) == [0, 1, 0, 0]
    assert frequencies(shuffled, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert frequencies(shuffled, top_p=0.85) == pytest.approx([2 / 9, 4 / 9, 0, 3 / 9], abs=0.03)
    assert frequencies(shuffled, top_p=1e-9) == [0, 1, 0, 0], "the best token always stays"
    # Of the two kept by top_k, 0.4/0.7 and 0.3/0.7, the first alone holds 0.5.
    assert frequencies(shuffled, top_k=2, top_p=0.5) == [0, 1, 0, 0]


def test_temperature_comes_before_top_p(fixed):
    """At temperature 0.5 the best has 0.16/0.30 of the probability, so it alone holds 0.5."""
    assert frequencies(fixed(LOGITS), temperature=0.5, top_p=0.5) == [1, 0, 0, 0]
    assert frequencies(fixed(LOGITS), top_p=0.5)[1] > 0


def test_repetition_penalty_lowers_what_was_seen(fixed):
    positive = fixed([3.0, 2.0, 1.4])
    said = generate(positive, [[60]], max_new_tokens=4, temperature=0, repetition_penalty=2.0)[0]
    assert said == [0, 1, 0, 0], "3; then 2 beats 3/2; then 3/2 beats 1.4 and 2/2, and stays"
    assert generate(positive, [[0]], max_new_tokens=1, temperature=0, repetition_penalty=2.0) == [[1]], (
        "the prompt is seen"
    )
    negative = fixed([-1.0, -1.5, -1.9])
    said = generate(negative, [[60]], max_new_tokens=3, temperature=0, repetition_penalty=2.0)[0]
    assert said == [0, 1, 2], "negative scores are multiplied"
    assert generate(positive, [[60]], max_new_tokens=3, temperature=0, repetition_penalty=1.0) == [[0, 0, 0]]


def test_padding_is_not_seen_by_the_penalty(fixed):
    """Padding is filled with id 0, which must count as seen only where the prompt has it."""
    model = fixed([3.0, 2.0])
    said = generate(model, [[5], [6, 6, 6], [0, 6, 6], [6, 0]], max_new_tokens=1, temperature=0, repetition_penalty=2.0)
    assert said == [[0], [0], [1], [1]]


def test_a_seed_decides_and_the_global_generator_is_left_alone(tiny_model):
    model = tiny_model().eval()
    state = torch.get_rng_state()

    def say(seed):
        return generate(model, PROMPTS, max_new_tokens=20, temperature=2.0, seed=seed)

    assert say(1) == say(1) != say(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_is_not_changed_and_nothing_is_counted(tiny_model):
    model = tiny_model().eval()
    generate(model, PROMPTS, max_new_tokens=3)
    assert not model.training and not model.routing_counts()[0].any()


def test_autocast_changes_nothing_on_a_cpu(tiny_model, monkeypatch):
    """A token is bound by reading the weights, so they are read as they are: float32 logits, bit for bit, and cache."""
    model = tiny_model(use_qk_norm=True).eval()
    dtypes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    expected = generate(model, PROMPTS, max_new_tokens=12, seed=3, top_k=40)
    caches, cache = [], generate_module.KVCache
    monkeypatch.setattr(generate_module, "KVCache", lambda *args: caches.append(cache(*args)) or caches[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = generate(model, PROMPTS, max_new_tokens=12, seed=3, top_k=40)
        alone = []
        for token in stream(model, PROMPTS[0], max_new_tokens=12, temperature=0):
            alone.append(token)
            assert torch.is_autocast_enabled("cpu"), "between tokens autocast is the caller's"
        assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.bfloat16, "and afterwards"
    assert together == expected and set(dtypes) == {torch.float32}
    assert alone == generate(model, PROMPTS[:1], max_new_tokens=12, temperature=0)[0]
    assert {layer.dtype for c in caches for layer in c.layers} == {torch.float32}


def test_a_bfloat16_model_generates(tiny_model):
    model = tiny_model(dtype=torch.bfloat16).eval()
    assert [len(row) for row in generate(model, PROMPTS, max_new_tokens=5, temperature=0)] == [5] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_out_of_range_is_named(tiny_model, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}: {value}"):
        generate(tiny_model().eval(), [[1]], **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("prompt", [[], [1] * 64, [1] * 65], ids=len)
def test_a_prompt_that_does_not_fit_is_refused(tiny_model, prompt):
    with pytest.raises(ValueError, match=f"prompt: {len(prompt)} tokens"):
        generate(tiny_model().eval(), [[1], prompt], max_new_tokens=2)
