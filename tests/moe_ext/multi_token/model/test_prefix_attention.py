import math

import pytest
import torch
from multi_token_testing import VOCABULARY, make_backbone, make_model

from moe_common.runs.options import OptionParser
from moe_ext.multi_token.decoding.generation import COST_CONTEXT, DecodingLoop, costs_of, generate
from moe_ext.multi_token.decoding.planning import Choice, FixedPlan
from moe_ext.multi_token.decoding.sources import HeadSource
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE, Training
from moe_ext.multi_token.model.prefix_attention import ROTARY_BASE, PrefixAttention
from moe_ext.multi_token.options import TrainOptions
from moe_ext.multi_token.training.data import Task
from moe_ext.multi_token.training.ppo import PPOSettings, play, train_ppo


def random_layer(hidden_size=16):
    torch.manual_seed(0)
    layer = PrefixAttention(hidden_size)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.double()


def random_text(hidden_size=16, num_rows=2, length=7):
    """States, embeddings of one token more, and a mask without padding."""
    torch.manual_seed(1)
    states = torch.randn(num_rows, length, hidden_size, dtype=torch.float64)
    tokens = torch.randn(num_rows, length + 1, hidden_size, dtype=torch.float64)
    return states, tokens, torch.ones(num_rows, length, dtype=torch.long)


def norm(x, weight):
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


def turned(vector, position):
    """Each pair of numbers as a complex one, turned by its angle."""
    half = len(vector) // 2
    found = torch.zeros_like(vector)
    for i in range(half):
        angle = position * ROTARY_BASE ** (-2 * i / len(vector))
        number = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        found[i], found[i + half] = number.real, number.imag
    return found


@torch.no_grad()
def written_out(layer, states, tokens, mask):
    """One row, one position, one attention head at a time; rows of nothing where there is padding."""
    found = torch.full_like(states, torch.nan)
    size = layer.head_size
    for row in range(states.shape[0]):
        places = [place for place in range(states.shape[1]) if mask[row, place]]
        state = [norm(each, layer.state_norm.weight) for each in states[row]]
        token = [norm(each, layer.token_norm.weight) for each in tokens[row]]
        for number, place in enumerate(places):
            query = layer.query.weight @ torch.cat([state[place], token[place + 1]])
            gathered = []
            for head in range(layer.num_heads):
                part = slice(head * size, (head + 1) * size)
                scores, values = [], []
                for other_number, other in enumerate(places[: number + 1]):
                    key = layer.key.weight @ torch.cat([state[other], token[other]])
                    value = layer.value.weight @ torch.cat([state[other], token[other + 1]])
                    scores.append(turned(query[part], number) @ turned(key[part], other_number) / math.sqrt(size))
                    values.append(value[part])
                weights = [math.exp(score - max(scores)) for score in scores]
                gathered.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
            found[row, place] = states[row, place] + layer.out.weight @ torch.cat(gathered)
    return found


@pytest.mark.parametrize("hidden_size", [6, 16, 130])
def test_the_layer_is_its_formula_at_each_position(hidden_size):
    layer = random_layer(hidden_size)
    assert layer.num_heads == {6: 1, 16: 1, 130: 2}[hidden_size]
    text = random_text(hidden_size, length=4)
    torch.testing.assert_close(layer(*text)[0], written_out(layer, *text), atol=1e-6, rtol=1e-5)


def test_rows_with_padding_are_their_formula_where_there_is_none():
    layer, (states, tokens, mask) = random_layer(), random_text()
    mask[1, :3] = 0
    found, expected = layer(states, tokens, mask)[0], written_out(layer, states, tokens, mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize("split", range(1, 7))
def test_a_text_in_two_parts_gives_what_it_gives_whole(split, padded):
    layer, (states, tokens, mask) = random_layer(), random_text()
    mask[1, :padded] = 0
    whole, kept_whole = layer(states, tokens, mask)
    first, kept = layer(states[:, :split], tokens[:, : split + 1], mask[:, :split])
    second, kept_after = layer(states[:, split:], tokens[:, split:], mask[:, split:], kept)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(vars(kept_after), vars(kept_whole))
    assert kept.mask_BM.shape[1] == split  # as it was


@pytest.mark.parametrize("place", range(7))
def test_what_comes_later_changes_nothing_earlier(place):
    layer, (states, tokens, mask) = random_layer(), random_text()
    before, _ = layer(states, tokens, mask)
    states[:, place], tokens[:, place + 1] = 5.0, -5.0
    after, _ = layer(states, tokens, mask)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place:], after[:, place:]).all(dim=-1).any()


def test_padding_on_the_left_changes_nothing():
    layer, (states, tokens, mask) = random_layer(), random_text()
    expected, _ = layer(states, tokens, mask)
    pad = torch.nn.functional.pad
    found, _ = layer(pad(states, (0, 0, 3, 0), value=9.0), pad(tokens, (0, 0, 3, 0), value=9.0), pad(mask, (3, 0)))
    torch.testing.assert_close(found[:, 3:], expected)


def test_a_token_finds_what_followed_it_before():
    """Keys of tokens alone, values of what follows them, queries of the last token: a copy, by weights set by hand."""
    layer, size = PrefixAttention(8), 8
    with torch.no_grad():
        for name, scale in (("query", 30.0), ("key", 1.0), ("value", 1.0)):
            getattr(layer, name).weight.copy_(torch.cat([torch.zeros(size, size), scale * torch.eye(size)], dim=1))
        layer.out.weight.copy_(torch.eye(size))
    embedding = torch.eye(size)
    text = torch.tensor([[3, 2, 7, 6, 3]])  # 3 and 7 lie in the pair that turns by next to nothing in so short a text
    found, _ = layer(torch.zeros(1, 4, size), embedding[text], torch.ones(1, 4))
    assert int(found[0, -1].argmax()) == 2


def without(model):
    """The same heads and routers, and no attention before them."""
    plain = MultiTokenMoE(model.backbone, MultiTokenConfig(**{**vars(model.config), "prefix_attention": False}))
    assert plain.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    return plain.eval()


def batch():
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


@pytest.mark.parametrize("stage", ["heads", "router"])
def test_training_begins_with_the_losses_of_heads_without_it(stage):
    model = make_model()
    torch.nn.init.zeros_(model.heads.prefix.out.weight)
    plain = without(model)
    model.training_state = plain.training_state = Training(stage=stage, heads_on=2)
    found, expected = model(**batch()), plain(**batch())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_once_trained_it_changes_what_the_heads_say():
    model = make_model()
    model.training_state = Training()
    assert not torch.isclose(model(**batch())["loss"], without(model)(**batch())["loss"])


def test_the_router_reads_it_and_does_not_train_it():
    model = make_model()
    model.training_state = Training(stage="router", heads_on=2)
    parts = model(**batch())
    for name in ("bce", "copy_bce"):
        model.zero_grad()
        parts[name].backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in model.heads.prefix.parameters())
    torch.nn.init.zeros_(model.heads.prefix.out.weight)
    other = model(**batch())
    assert not torch.isclose(parts["bce"], other["bce"])


def test_independent_heads_have_none():
    model = MultiTokenMoE(make_backbone(), MultiTokenConfig(kind="independent", prefix_attention=True))
    assert model.heads.prefix is None and not model.config.prefix_attention


@pytest.mark.parametrize(("words", "there"), [([], True), (["--no_prefix_attention"], False)])
def test_heads_are_trained_with_it_unless_it_is_left_out(words, there):
    (options,) = OptionParser((TrainOptions,)).parse(["--data=prose", "--out=run", *words])
    assert options.model_config().prefix_attention == there


def test_every_pass_whose_cost_is_measured_is_read_behind_the_same_text(monkeypatch):
    model, lengths, inner = make_model(), [], MultiTokenMoE.first_states

    def watched(self, state_BQD, ids_BT, mask_BQ, past=None):
        lengths.append(0 if past is None else past.mask_BM.shape[1])
        return inner(self, state_BQD, ids_BT, mask_BQ, past)

    monkeypatch.setattr(MultiTokenMoE, "first_states", watched)
    costs_of(model, ["heads"])
    assert len(lengths) > 4 and set(lengths[1:]) == {COST_CONTEXT}


class Watched(HeadSource):
    """Notes, of each pass, the text so far and the draft behind it."""

    def start(self, ids_BP, mask_BP):
        super().start(ids_BP, mask_BP)
        self.seen = []

    def gates(self, state_BQD, ids_BL):
        self.text = ids_BL
        return super().gates(state_BQD, ids_BL)

    def write(self, token_B, num_drafts):
        draft = super().write(token_B, num_drafts)
        self.seen.append((self.text, self.first_BD, draft))
        return draft


def left_padded(num_rows, length=6):
    tokens = torch.randint(3, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    for row in range(num_rows):
        mask[row, :row] = 0
    return {"input_ids": torch.where(mask.bool(), tokens, 2), "attention_mask": mask}


@torch.no_grad()
def drafted_from_the_whole_text(model, text, mask, num_drafts):
    """The first state and the draft behind a text, from one pass over all of it, as in training."""
    read = text[:, :-1]
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    states = model.backbone.base_model(read, attention_mask=mask, position_ids=positions).last_hidden_state
    first = state = model.first_states(states, text, mask)[0][:, -1]
    token, draft = text[:, -1], []
    for place in range(num_drafts):
        state = model.heads.step(place, first, state, model.embed(token))
        token = model.heads.logits(place, state, model.lm_head).argmax(dim=-1)
        draft.append(token)
    return first, torch.stack(draft, dim=1)


class NowAndThen(FixedPlan):
    """Asks in every third pass alone."""

    turn = 0

    def asks(self, name):
        self.turn += 1
        return self.turn % 3 == 0

    def choose(self, gates):
        return super().choose(gates) if gates else Choice()


@pytest.mark.parametrize("plan", [FixedPlan, NowAndThen])
@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_drafts_while_generating_are_those_of_a_pass_over_the_whole_text(family, num_rows, verified, plan):
    model, given = make_model(family), left_padded(num_rows)
    model.backbone.generation_config.eos_token_id = None
    source = Watched(model)
    loop = DecodingLoop([source], plan(2), verified=verified)
    model.backbone.generate(**given, custom_generate=loop, max_new_tokens=24, do_sample=False)
    assert len(source.seen) > 3
    for text, first, draft in source.seen:
        mask = torch.nn.functional.pad(
            given["attention_mask"], (0, text.shape[1] - 1 - given["attention_mask"].shape[1]), value=1
        )
        expected_first, expected_draft = drafted_from_the_whole_text(model, text, mask, draft.shape[1])
        torch.testing.assert_close(first, expected_first, atol=1e-4, rtol=1e-4)
        assert torch.equal(draft, expected_draft)


def test_behind_a_cache_that_was_filled_before_it_begins_at_what_it_sees():
    model, given = make_model(), left_padded(1)
    model.backbone.generation_config.eos_token_id = None
    asked = {"do_sample": False, "return_dict_in_generate": True}
    first = model.backbone.generate(**given, **asked, max_new_tokens=8)
    more = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    expected = model.backbone.generate(**more, max_new_tokens=8, do_sample=False)
    decoding = generate(
        model, **more, past_key_values=first.past_key_values, max_new_tokens=8, do_sample=False, plan=FixedPlan(2)
    )
    assert torch.equal(decoding.sequences, expected)


def test_each_window_of_an_answer_starts_from_all_the_text_before_it():
    model = make_model("llama")
    model.backbone.generation_config.eos_token_id = model.backbone.config.eos_token_id = None
    with torch.no_grad():
        model.router.layers[-1].bias.fill_(9.0)
    task = Task([3, 4, 8, 5], [7])
    episode = play(model, task, PPOSettings(steps=1, longest=9), greedy=True)
    windows = episode.windows
    assert len(windows.first_N) > 1
    begun = 0
    for state, first, spoken in zip(windows.state_ND, windows.first_N, windows.spoken_NH, strict=True):
        text = torch.tensor([[*task.prompt, *episode.written[:begun], int(first)]])
        expected, _ = drafted_from_the_whole_text(model, text, torch.ones_like(text[:, 1:]), 1)
        torch.testing.assert_close(state, expected[0], atol=1e-4, rtol=1e-4)
        begun += 1 + int(((spoken >= 0) & (spoken < model.off_id)).sum())


def test_policy_optimisation_leaves_it_as_it_is(tmp_path):
    model = make_model()
    before = {name: value.clone() for name, value in model.heads.state_dict().items()}
    train_ppo(model, [Task([3, 4], [5, 1])], PPOSettings(steps=2, episodes=2, lr=1e-2, longest=6), tmp_path)
    changed = {name for name, value in model.heads.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("prefix.") for name in changed)
