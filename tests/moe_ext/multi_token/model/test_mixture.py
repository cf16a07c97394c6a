import pytest
import torch
from multi_token_testing import END, FAMILIES, VOCABULARY, make_backbone, make_model
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

from moe_common.text.packing import IGNORED_LABEL
from moe_ext.multi_token.model.backbone import check_backbone, lm_head_input
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE, Training, heads_on


def batch(num_rows=2, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (num_rows, length), generator=generator)
    tokens[0, 4] = END
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def window_by_window(model, given):
    """The loss of stage 1, one position and one head at a time."""
    tokens, labels = given["input_ids"], given["labels"]
    found = []
    states = model.states(tokens, given["attention_mask"])
    for row in range(tokens.shape[0]):
        for place in range(tokens.shape[1] - 1):
            if labels[row, place + 1] == IGNORED_LABEL:
                continue
            first = state = first_state(model, given, states, row, place)
            ended = False
            for head in range(model.config.num_heads):
                read = labels[row, place + 1 + head]
                ended = ended or read == END
                embedded = model.embed(read[None])
                if after_end(labels[row], place, head):
                    embedded = torch.zeros_like(embedded)
                state = model.heads.step(head, first, state, embedded)
                at = place + 2 + head
                if ended:
                    target = model.off_id
                elif at < tokens.shape[1] and labels[row, at] != IGNORED_LABEL:
                    target = int(labels[row, at])
                else:
                    break
                logits = model.heads.logits(head, state, model.lm_head)
                found.append(cross_entropy(logits, torch.tensor([target])))
                if at >= tokens.shape[1]:
                    break
    return torch.stack(found).mean()


def first_state(model, given, states, row, place):
    """What the first head starts from, of the text up to there and the token that follows."""
    tokens, mask = given["input_ids"][row, None, : place + 2], given["attention_mask"][row, None, : place + 1]
    return model.first_states(states[row, None, : place + 1], tokens, mask)[0][:, -1]


def after_end(labels, place, head):
    """Whether the token that the head reads comes after the end of its window."""
    return END in labels[place + 1 : place + 1 + head].tolist()


@pytest.mark.parametrize("kind", ["sequential", "independent"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_is_that_of_every_window_and_head_one_by_one(family, kind):
    model, given = make_model(family, kind=kind, num_heads=2), batch()
    model.training_state = Training()
    torch.testing.assert_close(model(**given)["loss"], window_by_window(model, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_no_loss(family):
    model, given = make_model(family), batch()
    expected = model(**given)["loss"]
    for side in ((3, 0), (0, 3)):
        padded = {
            name: torch.nn.functional.pad(value, side, value={"labels": IGNORED_LABEL}.get(name, 0))
            for name, value in given.items()
        }
        if side == (3, 0) and family == "gpt2":
            continue  # learnt positions begin at 0 where no position_ids are given, as training has it
        torch.testing.assert_close(model(**padded)["loss"], expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_not_learnt_counts_nothing_but_is_read():
    model, given = make_model(), batch()
    given["labels"][:, :5] = IGNORED_LABEL
    loss = model(**given)["loss"]
    torch.testing.assert_close(loss, window_by_window(model, given), rtol=1e-4, atol=1e-5)
    given["input_ids"][:, 1] = torch.where(given["input_ids"][:, 1] == 3, 4, 3)
    assert model(**given)["loss"] != loss


def test_the_backbone_is_neither_trained_nor_saved():
    model = make_model()
    assert all(name.startswith(("heads.", "router.", "copy_router.")) for name in model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    model.train()
    assert not model.backbone.training
    before = [parameter.clone() for parameter in model.backbone.parameters()]
    model.training_state = Training(stage="router", heads_on=2)
    model(**batch())["loss"].backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_teacher_forcing_heads_read_their_own_drafts():
    model, given = make_model(), batch()
    states = model.states(given["input_ids"], given["attention_mask"])[:, 0]
    targets = torch.full((2, 4), 7)
    nll, right, read_truth = model.read_windows(states, targets, 0.0)
    first, state, token = states, states, targets[:, 0]
    truth = torch.ones(2, dtype=torch.bool)
    for place in range(3):
        state = model.heads.step(place, first, state, model.embed(token))
        logits = model.heads.logits(place, state, model.lm_head)
        torch.testing.assert_close(nll[:, place], -logits.log_softmax(dim=-1)[:, 7])
        assert torch.equal(read_truth[:, place], truth)
        token = logits.argmax(dim=-1)
        assert torch.equal(right[:, place], token == 7)
        truth = truth & (token == 7)


def test_teacher_forcing_is_a_share_of_the_positions():
    model = make_model()
    states, targets = torch.randn(2000, 32), torch.full((2000, 4), 7)
    torch.manual_seed(0)
    _, right, read_truth = model.read_windows(states, targets, 0.25)
    expected = 0.25 + 0.75 * right[:, 0].float().mean()
    assert float(read_truth[:, 1].float().mean()) == pytest.approx(float(expected), abs=0.05)


@pytest.mark.parametrize("average", [0.5, 1.5, 2.0])
def test_heads_are_on_where_their_gates_are_highest(average):
    gates = torch.rand(10, 3).cumprod(dim=1)
    on = heads_on(gates, average)
    assert int(on.sum()) == round(10 * average)
    assert gates[on].min() >= gates[~on].max()
    assert torch.equal(on, on.long().cumprod(dim=1).bool())  # the first ones of each position


def test_all_heads_are_on_where_no_limit_is_set():
    assert heads_on(torch.rand(4, 3), float("inf")).all()
    assert heads_on(torch.rand(4, 3), 3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_that_is_trained_on_is_the_one_that_is_drafted_from(family):
    backbone = make_backbone(family)
    tokens = torch.randint(3, VOCABULARY, (2, 6))
    model = MultiTokenMoE(backbone, MultiTokenConfig())
    with lm_head_input(backbone) as caught:
        backbone(tokens)
    torch.testing.assert_close(model.states(tokens, torch.ones_like(tokens)), caught.state_BLD)


def test_a_model_whose_lm_head_reads_something_else_is_refused():
    backbone = make_backbone()
    backbone.get_output_embeddings().register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    with pytest.raises(ValueError, match=r"\(1, 4, 32\)"):
        check_backbone(backbone)


def test_a_model_without_a_decoder_and_an_lm_head_is_refused():
    config = T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration.*decoder"):
        check_backbone(T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_max": 4}, r"k_max.*\b4\b.*\b1\b.*heads \(3\)"),
        ({"k_max": 0}, "k_max is 0"),
        ({"num_heads": 0}, "heads is 0"),
        ({"head_width": 0}, "head_width is 0"),
        ({"draft_vocabulary": 0}, "draft_vocabulary is 0"),
        ({"max_copy": 0}, "max_copy is 0"),
        ({"teacher_forcing_end": 1.5}, "teacher_forcing_end is 1.5"),
        ({"kind": "both"}, "kind is 'both'"),
        ({"w_lb": -1.0}, "w_lb is -1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        MultiTokenConfig(**changed)


@pytest.mark.parametrize("name", ["w_bce", "w_lb", "w_ent", "w_budget"])
def test_every_loss_weight_counts(name):
    model, given = make_model(), batch()
    model.training_state = Training(stage="router", heads_on=0.5)
    model.eval()
    before = float(model(**given)["loss"])
    setattr(model.config, name, getattr(model.config, name) + 1.0)
    assert float(model(**given)["loss"]) > before
