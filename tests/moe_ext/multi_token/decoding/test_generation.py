import pytest
import torch
from multi_token_testing import END, FAMILIES, VOCABULARY, make_backbone, make_model, oracle_loop
from tiny_models import tiny_model
from transformers import Cache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from moe_ext.multi_token.decoding.generation import DecodingLoop, costs_of, generate
from moe_ext.multi_token.decoding.planning import Choice, FixedPlan, OpenGates, PassCosts, Planner
from moe_ext.multi_token.decoding.sources import sources_of
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE

NEW = 24


def prompts(num_rows: int, length: int = 6, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (num_rows, length), generator=generator)


def left_padded(num_rows: int) -> dict[str, torch.Tensor]:
    tokens, mask = prompts(num_rows), torch.ones(num_rows, 6, dtype=torch.long)
    for row in range(num_rows):
        mask[row, :row] = 0
    return {"input_ids": torch.where(mask.bool(), tokens, 2), "attention_mask": mask}


def whole_mask(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def greedy(backbone, given: dict, **settings) -> torch.Tensor:
    return backbone.generate(**given, do_sample=False, **{"max_new_tokens": NEW, **settings})


def with_oracle(model, given, future, *, wrong, drafted=3, **settings):
    loop = oracle_loop(future, wrong=wrong, drafted=drafted)
    tokens = model.backbone.generate(
        **given, do_sample=False, custom_generate=loop, **{"max_new_tokens": NEW, **settings}
    )
    return tokens, loop.report


@pytest.mark.parametrize("family", FAMILIES)
def test_own_heads_give_exactly_what_generate_gives(family):
    model, given = make_model(family), whole_mask(prompts(1))
    decoding = generate(model, **given, do_sample=False, max_new_tokens=NEW, plan=FixedPlan(3))
    assert torch.equal(decoding.sequences, greedy(model.backbone, given))


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_of_any_quality_give_exactly_what_generate_gives(family, wrong):
    model, given = make_model(family), whole_mask(prompts(1))
    expected = greedy(model.backbone, given)
    tokens, report = with_oracle(model, given, expected, wrong=wrong)
    assert torch.equal(tokens, expected)
    if wrong == 0.0:
        # The prompt's pass gives one token; every later one three drafts and its own.
        assert report.passes == 1 + -(-(report.tokens - 1) // 4)
        assert report.sources["heads"].accepted == report.sources["heads"].drafted
    if wrong == 1.0:
        assert report.passes == report.tokens
        assert sum(report.sources["heads"].accepted) == 0


@pytest.mark.parametrize("sources", [["copies"], ["heads", "copies"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_the_text_give_exactly_what_generate_gives(family, sources):
    model, given = make_model(family), whole_mask(prompts(1).repeat(1, 3))
    settings = {"max_new_tokens": 48, "do_sample": False}
    report = check_copies(model, given, sources, **settings)
    assert report.sources["copies"].drafted[0] > 0


@pytest.mark.parametrize("sources", [["copies"], ["heads", "copies"]])
def test_copies_in_a_batch_give_exactly_what_generate_gives(sources):
    model, given = make_model(), left_padded(3)
    check_copies(model, given, sources, max_new_tokens=48, do_sample=False)


def check_copies(model, given, sources, **settings):
    """Generate with copies wherever there are any; gives the report."""

    class Eager(FixedPlan):
        """Copies where all rows have some, else heads."""

        def asks(self, name):
            return True

        def choose(self, gates):
            return FixedPlan(6, "copies" if gates["copies"].shape[1] else self.source).choose(gates)

    plan = Eager(2, sources[0])
    decoding = generate(model, **given, sources=sources, plan=plan, **settings)
    assert torch.equal(decoding.sequences, model.backbone.generate(**given, **settings))
    return decoding.report


def test_a_text_in_a_circle_is_copied_in_few_passes():
    """A backbone that always says the same token: every copy stands."""
    model, given = make_model(max_copy=8), whole_mask(prompts(1))
    with torch.no_grad():
        for parameter in model.backbone.get_output_embeddings().parameters():
            parameter.zero_()  # the first of equal scores is the token 0
    model.backbone.generation_config.eos_token_id = None
    report = check_copies(model, given, ["copies"], max_new_tokens=30, do_sample=False)
    # A token of the prompt's pass, one of a pass with nothing to copy; then nine a pass.
    assert report.passes == 2 + -(-28 // 9)


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_with_left_padding_give_exactly_what_generate_gives(family, wrong):
    model, given = make_model(family), left_padded(4)
    expected = greedy(model.backbone, given)
    tokens, _ = with_oracle(model, given, expected, wrong=wrong)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_end_early_are_padded_as_generate_pads_them(seed):
    backbone = make_backbone(seed=seed)
    given = left_padded(3)
    # A token that the first row will write, so that rows end at different places, in the middle of a draft.
    backbone.generation_config.eos_token_id = int(greedy(backbone, given, eos_token_id=None)[0, 6 + 5])
    model = MultiTokenMoE(backbone, MultiTokenConfig(num_heads=3))
    expected = greedy(backbone, given)
    tokens, _ = with_oracle(model, given, greedy(backbone, given, eos_token_id=None), wrong=0.2)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5])
def test_no_token_beyond_the_limit_is_written_or_read(max_new_tokens):
    model, given = make_model(), whole_mask(prompts(1))
    future = greedy(model.backbone, given)
    tokens, report = with_oracle(model, given, future, wrong=0.0, max_new_tokens=max_new_tokens)
    assert torch.equal(tokens, future[:, : 6 + max_new_tokens])
    assert report.tokens == max_new_tokens
    # The prompt's pass and the last one give a token each that nobody has to draft.
    assert sum(report.sources["heads"].drafted) == max(0, max_new_tokens - 2)


def test_positions_that_the_backbone_does_not_have_are_never_read():
    model = make_model("gpt2")  # 128 learnt positions
    given = whole_mask(prompts(1, length=120))
    expected = greedy(model.backbone, given, max_new_tokens=8)
    tokens, _ = with_oracle(model, given, expected, wrong=0.0, max_new_tokens=8)
    assert torch.equal(tokens, expected)


def test_logits_processors_see_the_tokens_before_each_place():
    model, given = make_model(), whole_mask(prompts(1))
    settings = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = greedy(model.backbone, given, **settings)
    assert not torch.equal(expected, greedy(model.backbone, given))
    tokens, report = with_oracle(model, given, expected, wrong=0.2, **settings)
    assert torch.equal(tokens, expected)
    assert report.passes < report.tokens


def test_a_processor_that_counts_its_calls_is_called_once_a_token():
    class Counting(LogitsProcessor):
        lengths: list[int] = []

        def __call__(self, input_ids, scores):
            self.lengths.append(input_ids.shape[1])
            return scores

    model, given = make_model(), whole_mask(prompts(1))
    expected = greedy(model.backbone, given)
    with_oracle(model, given, expected, wrong=0.4, logits_processor=LogitsProcessorList([Counting()]))
    assert Counting.lengths == list(range(6, expected.shape[1]))


def test_generation_goes_on_from_a_filled_cache():
    model, given = make_model(), whole_mask(prompts(1))
    expected = greedy(model.backbone, given)
    first = model.backbone.generate(
        **given,
        do_sample=False,
        max_new_tokens=8,
        return_dict_in_generate=True,
        custom_generate=oracle(model, expected),
    )
    more = whole_mask(first.sequences)
    tokens = model.backbone.generate(
        **more,
        past_key_values=first.past_key_values,
        do_sample=False,
        max_new_tokens=NEW - 8,
        custom_generate=oracle(model, expected),
    )
    assert torch.equal(tokens, expected)


def oracle(model, future):
    return oracle_loop(future, wrong=0.2)


def test_several_returned_sequences_are_a_batch():
    model, given = make_model(), whole_mask(prompts(1))
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
    torch.manual_seed(0)
    tokens = generate(model, **given, plan=FixedPlan(3), **settings).sequences
    assert tokens.shape == (3, 6 + NEW) or (tokens == END).any()
    assert len({tuple(row) for row in tokens.tolist()}) > 1


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_sampling_draws_from_the_backbone_whatever_is_drafted(num_rows, wrong):
    """Each token is one draw from the backbone's own scores: with the same seed, the text is that of `generate`."""
    model, given = make_model(), left_padded(num_rows)
    with torch.no_grad():
        model.backbone.get_output_embeddings().weight.mul_(0.3)
    settings = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "max_new_tokens": NEW}
    model.backbone.generation_config.eos_token_id = None
    texts = []
    for seed in range(4):
        torch.manual_seed(seed)
        expected = model.backbone.generate(**given, **settings)
        loop = oracle_loop(expected, wrong=wrong)
        torch.manual_seed(seed)
        tokens = model.backbone.generate(**given, custom_generate=loop, **settings)
        assert torch.equal(tokens, expected)
        assert wrong == 1.0 or loop.report.tokens_per_pass > 1
        texts.append(tuple(tokens.flatten().tolist()))
    assert len(set(texts)) == 4


@pytest.mark.parametrize("num_rows", [1, 3])
def test_sampling_draws_from_the_backbone_whatever_is_copied(num_rows):
    """With the same seed the text is that of `generate`, copies accepted and copies refused."""
    model, given = make_model(), left_padded(num_rows)
    model.backbone.generation_config.eos_token_id = None
    # Three tokens are left to choose from, so that some copies are right.
    settings = {
        "do_sample": True,
        "temperature": 30.0,
        "suppress_tokens": [token for token in range(VOCABULARY) if token not in (5, 6, 7)],
        "max_new_tokens": NEW,
    }
    drafted = accepted = 0
    for seed in range(6):
        torch.manual_seed(seed)
        expected = model.backbone.generate(**given, **settings)
        torch.manual_seed(seed)
        decoding = generate(model, **given, sources=["copies"], plan=FixedPlan(4, "copies"), **settings)
        assert torch.equal(decoding.sequences, expected)
        drafted += decoding.report.sources["copies"].drafted[0]
        accepted += decoding.report.sources["copies"].accepted[0]
    assert 0 < accepted < drafted


class Collected(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_prompt_and_tokens_in_order_and_the_end():
    model, given = make_model(), whole_mask(prompts(1))
    streamer = Collected()
    decoding = generate(model, **given, do_sample=False, max_new_tokens=NEW, plan=FixedPlan(2), streamer=streamer)
    assert streamer.ended
    assert streamer.pieces[0] == given["input_ids"][0].tolist()
    assert sum(streamer.pieces, []) == decoding.sequences[0].tolist()


def test_an_unverified_draft_stands_as_it_is():
    model, given = make_model(), whole_mask(prompts(1))
    model.backbone.generation_config.eos_token_id = None
    future = torch.arange(60)[None] % VOCABULARY
    loop = oracle_loop(future, wrong=0.0, verified=False)
    tokens = model.backbone.generate(**given, do_sample=False, max_new_tokens=9, custom_generate=loop)
    # One token of the prompt's pass, then three drafts and the backbone's own, twice.
    assert tokens[0, 7:10].tolist() == [7, 8, 9]
    assert tokens[0, 11:14].tolist() == [11, 12, 13]
    with torch.inference_mode():
        own = model.backbone(tokens).logits.argmax(dim=-1)[0]
    assert [int(tokens[0, place]) for place in (6, 10, 14)] == [int(own[place - 1]) for place in (6, 10, 14)]


def test_fast_asks_only_heads_whose_gate_is_open():
    model, given = make_model(), whole_mask(prompts(1))
    with torch.no_grad():
        model.router.layers[-1].weight.zero_()
        model.router.layers[-1].bias.copy_(torch.tensor([4.0, -4.0, 4.0]))
    report = generate(model, **given, do_sample=False, max_new_tokens=12, mode="fast").report
    assert report.sources["heads"].drafted[0] > 0
    assert report.sources["heads"].drafted[1:] == [0, 0]


def test_a_head_that_says_off_ends_the_draft():
    model, given = make_model(), whole_mask(prompts(1))
    with torch.no_grad():
        model.heads.blocks[1].off.bias.fill_(1e4)
    report = generate(model, **given, do_sample=False, max_new_tokens=12, plan=FixedPlan(3)).report
    assert report.sources["heads"].drafted[0] > 0
    assert report.sources["heads"].drafted[1:] == [0, 0]


def test_where_drafts_do_not_pay_none_is_made():
    model, given = make_model(), whole_mask(prompts(1))
    with torch.no_grad():
        model.router.layers[-1].weight.zero_()
        model.router.layers[-1].bias.fill_(-8.0)
    costs = PassCosts(1.0, {"heads": (1.0, 1.3, 1.6, 1.9)})
    decoding = generate(model, **given, do_sample=False, max_new_tokens=NEW, plan=Planner(costs), sources=["heads"])
    assert sum(decoding.report.sources["heads"].drafted) == 0
    assert decoding.report.passes == decoding.report.tokens


def test_heads_in_bfloat16_and_backbone_in_another_type_work_together():
    model, given = make_model(), whole_mask(prompts(1))
    model.backbone.bfloat16()
    decoding = generate(model, **given, do_sample=False, max_new_tokens=8, plan=FixedPlan(2))
    assert decoding.sequences.shape[1] > 6


def test_every_number_of_drafts_has_a_cost_and_measuring_leaves_no_hook_behind():
    model = make_model()
    costs = costs_of(model, ["heads"])
    assert len(costs.ms["heads"]) == 4 and min(costs.ms["heads"]) > 0
    assert not model.backbone.base_model._forward_hooks
    assert not model.backbone.get_output_embeddings()._forward_pre_hooks


def test_the_costs_are_measured_in_the_first_call_for_a_batch_size(monkeypatch):
    model, measured = make_model(), []

    def measure(model, sources, *, batch_size):
        measured.append(batch_size)
        return costs_of(model, sources, batch_size=batch_size)

    monkeypatch.setattr("moe_ext.multi_token.decoding.generation.costs_of", measure)
    for batch_size in (1, 1, 2, 1):
        generate(model, **whole_mask(prompts(batch_size)), max_new_tokens=3, do_sample=False)
    assert measured == [1, 2]


def test_beams_are_refused():
    model, given = make_model(), whole_mask(prompts(1))
    with pytest.raises(ValueError, match="beam_search.*beams"):
        generate(model, **given, num_beams=2, max_new_tokens=4, plan=FixedPlan(1))


def test_scores_are_refused():
    model, given = make_model(), whole_mask(prompts(1))
    settings = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    with pytest.raises(ValueError, match="output_scores"):
        generate(model, **given, max_new_tokens=4, plan=FixedPlan(1), **settings)


def test_generation_without_a_cache_is_refused():
    model, given = make_model(), whole_mask(prompts(1))
    with pytest.raises(ValueError, match="use_cache=True"):
        generate(model, **given, max_new_tokens=4, do_sample=False, use_cache=False, plan=FixedPlan(1))


def test_a_static_cache_is_refused():
    model, given = make_model(), whole_mask(prompts(1))
    with pytest.raises(ValueError, match="cannot forget single tokens"):
        generate(model, **given, max_new_tokens=4, do_sample=False, cache_implementation="static", plan=FixedPlan(1))


def test_a_state_that_runs_through_the_text_is_refused():
    model = MultiTokenMoE(tiny_model("MambaConfig", vocab_size=VOCABULARY), MultiTokenConfig())
    with pytest.raises(ValueError, match="cache"):
        generate(model, **whole_mask(prompts(1)), max_new_tokens=4, do_sample=False, plan=FixedPlan(1))


def test_a_sliding_window_is_refused_where_transformers_does_not_record_what_it_drops(monkeypatch):
    model, given = make_model("mistral, window of 8"), whole_mask(prompts(1))
    monkeypatch.delattr(Cache, "is_recording_past")
    with pytest.raises(ValueError, match=r"windows.*transformers 5\.21"):
        generate(model, **given, max_new_tokens=4, do_sample=False, plan=FixedPlan(1))


def test_unread_drafts_without_heads_are_refused():
    model, given = make_model(), whole_mask(prompts(1))
    with pytest.raises(ValueError, match="fast.*copies.*heads"):
        generate(model, **given, max_new_tokens=4, do_sample=False, mode="fast", sources=["copies"])


def test_stop_strings_need_a_tokenizer():
    model, given = make_model(), whole_mask(prompts(1))
    with pytest.raises(ValueError, match="Pass tokenizer as well"):
        generate(model, **given, max_new_tokens=4, stop_strings=["x"], plan=FixedPlan(1))


def test_this_transformers_runs_a_loop_of_ours_inside_generate():
    """What the loop rests on; where it fails, transformers has changed `custom_generate`."""
    given = whole_mask(prompts(1))
    seen = {}

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen.update(model_kwargs, criteria=stopping_criteria, settings=generation_config)
        return input_ids

    make_backbone().generate(**given, custom_generate=loop, max_new_tokens=4, do_sample=False)
    assert {"past_key_values", "use_cache"} <= seen.keys()
    assert seen["settings"].max_length == 10
    assert any(hasattr(criterion, "eos_token_id") for criterion in seen["criteria"])


def test_gates_that_are_open_in_every_row_count():
    gates = torch.tensor([[0.9, 0.8, 0.2], [0.9, 0.4, 0.1]])
    assert OpenGates().choose({"heads": gates}) == Choice("heads", 1)
    assert OpenGates(threshold=0.3).choose({"heads": gates}) == Choice("heads", 2)
    assert OpenGates(threshold=0.9).choose({"heads": gates}) == Choice()


def test_the_loop_without_heads_is_plain_greedy_decoding():
    model, given = make_model(), left_padded(3)
    loop = DecodingLoop(sources_of(model, ["heads", "copies"]), FixedPlan(0))
    tokens = model.backbone.generate(**given, do_sample=False, max_new_tokens=NEW, custom_generate=loop)
    assert torch.equal(tokens, greedy(model.backbone, given))
