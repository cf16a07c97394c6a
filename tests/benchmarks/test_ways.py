import pytest
import torch
from torch.nn.functional import linear, softmax

from benchmarks.measure import check_against_the_loop, check_gradients, check_logits, forward_of, step_of
from benchmarks.models import SIZES, Setting, make_base, random_tokens, share
from benchmarks.textbook import ExpertLoop
from benchmarks.ways import all_ways, arrow, base_alone, loop, lora, passes, routed, xlora

TINY = Setting(size=SIZES["tiny"])
RANK = TINY.size.rank


@pytest.fixture(scope="module")
def base():
    return make_base(TINY)


@pytest.fixture(scope="module")
def input_ids():
    return random_tokens(TINY.size.vocab, 12, "cpu")


def some_ways():
    adapters = [xlora(3, rank=RANK), xlora(3, rank=RANK, trains_adapters=False), arrow(3, rank=RANK)]
    return [lora(RANK), routed(3, 2, rank=RANK), loop(3, 2, rank=RANK), passes(2, rank=RANK), *adapters]


def test_the_shared_copy_holds_the_same_parameters_and_its_own_modules(base):
    copied = share(base)
    assert all(mine is its for mine, its in zip(base.parameters(), copied.parameters(), strict=True))
    assert copied.model.layers[0] is not base.model.layers[0]
    assert copied.config is not base.config


def test_the_base_stays_as_it_was_when_ways_are_built_over_it(base, input_ids):
    before = base(input_ids=input_ids).logits
    for way in some_ways():
        way.build(base, training=True)
    assert torch.equal(base(input_ids=input_ids).logits, before)
    assert base.config.use_cache


@pytest.mark.parametrize("way", some_ways(), ids=lambda way: way.name)
def test_each_way_gives_logits_and_finite_gradients(base, input_ids, way):
    check_logits(forward_of(way.build(base, training=False), input_ids)(), input_ids, TINY.size.vocab)
    run = way.build(base, training=True)
    step_of(run, input_ids, TINY)()
    check_gradients(run)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_routed_model_equals_the_loop_over_its_experts(base, input_ids, top_k):
    mixture, textbook = routed(3, top_k, rank=RANK), loop(3, top_k, rank=RANK)
    ways = (base_alone(), mixture, textbook)
    outputs = {way.name: forward_of(way.build(base, training=False), input_ids)() for way in ways}
    assert check_against_the_loop(mixture, outputs, "float32")["difference"] < 1e-4
    outputs[mixture.name] = outputs[mixture.name] + 0.01
    with pytest.raises(RuntimeError, match=f"{mixture.name}.*{textbook.name}"):
        check_against_the_loop(mixture, outputs, "float32")


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_loop_equals_one_token_at_a_time(top_k):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5)
    downs = [torch.nn.Parameter(torch.randn(2, 6)) for _ in range(3)]
    ups = [torch.nn.Parameter(torch.randn(5, 2)) for _ in range(3)]
    gate = torch.nn.Parameter(torch.randn(3, 6))
    x = torch.randn(1, 7, 6)
    found = ExpertLoop(layer, downs, ups, gate, scaling=0.5, top_k=top_k)(x)

    for token in range(7):
        one = x[0, token]
        scores = gate @ one / (one.square().mean() + 1e-6).sqrt()
        if top_k is not None:
            scores[scores < scores.sort(descending=True).values[top_k - 1]] = -torch.inf
        weights = softmax(scores, dim=0)
        added = sum(w * 0.5 * (up @ (down @ one)) for w, down, up in zip(weights, downs, ups, strict=True))
        torch.testing.assert_close(found[0, token], linear(one, layer.weight, layer.bias) + added)


def test_separate_passes_mix_the_logits_of_their_adapters_and_train_all_of_them(base, input_ids):
    run = passes(2, rank=RANK).build(base, training=False)
    alone = []
    for name in run.names:
        run.model.set_adapter(name)
        alone.append(run.model(input_ids=input_ids).logits)
    torch.testing.assert_close(run.logits(input_ids), (alone[0] + alone[1]) / 2)
    assert all(parameter.requires_grad for parameter in run.parameters())


def test_generation_by_separate_passes_is_greedy_over_their_mean(base, input_ids):
    run = passes(2, rank=RANK).build(base, training=False)
    tokens = run.generate(input_ids, 3)
    for end in range(input_ids.shape[1], tokens.shape[1]):
        assert run.logits(tokens[:, :end])[0, -1].argmax() == tokens[0, end]


def test_every_adapter_of_a_way_trains(base):
    assert len(routed(3, rank=RANK).build(base, training=True).parameters()) == 14 * (3 * 2 + 1)
    assert len(passes(3, rank=RANK).build(base, training=True).parameters()) == 14 * 3 * 2
    assert len(arrow(3, rank=RANK).build(base, training=True).parameters()) == 14 * 3 * 2
    assert len(xlora(3, rank=RANK).build(base, training=True).parameters()) == 14 * 3 * 2 + 2
    assert len(xlora(3, rank=RANK, trains_adapters=False).build(base, training=True).parameters()) == 2


def test_a_base_in_bfloat16_trains_adapters_in_float32_and_runs_them_in_bfloat16():
    base = make_base(Setting(dtype="bfloat16", size=SIZES["tiny"]))
    for training, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        adapters = lora(RANK).build(base, training=training).parameters()
        assert {parameter.dtype for parameter in adapters} == {dtype}


def test_arrow_still_raises_under_autocast():
    setting = Setting(dtype="bfloat16", size=SIZES["tiny"])
    run = arrow(3, rank=RANK).build(make_base(setting), training=True)
    with pytest.raises(RuntimeError, match="scatter"):
        step_of(run, random_tokens(setting.size.vocab, 8, "cpu"), setting)()


def test_every_limit_and_every_loop_is_among_the_ways():
    names = [way.name for way in all_ways(16)]
    assert len(set(names)) == len(names)
    for way in all_ways(16):
        assert {way.limit, way.loop} - {None} <= set(names)
