"""The search on trainings with a known curve: verdicts, budgets, rates, and that an interruption changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from spectra.errors import JournalBusy, JournalError, MismatchError, TrainingError, UsageError
from spectra.intrinsic.journal import NAME, TrialJournal
from spectra.intrinsic.rates import RateLadder
from spectra.intrinsic.result import CSV, JSON
from spectra.intrinsic.searching import SearchConfig, search
from spectra.intrinsic.trial import Ask, Trial, subspace_trials
from tests.intrinsic.synthetic import Synthetic, failing, found

EXACT = {"noise": 0.0, "full_noise": 0.0}


def dimensions(run: Synthetic) -> list[int]:
    """In the order of their first training."""
    return list(dict.fromkeys(ask.dimension for ask in run.asks if ask.kind == "subspace" and ask.dimension))


@pytest.mark.parametrize("middle", [8.0, 300.0, 20_000.0])
@pytest.mark.parametrize("start", [None, 16, 100_000])
def test_finds_the_crossing_without_noise(middle: float, start: int | None) -> None:
    run = Synthetic(middle=middle, **EXACT)
    result = found(run, SearchConfig(steps=100, start=start))
    assert result.verdict == "reached"
    # Straight lines between points √2 apart miss a logistic by at most h²/8·|f''/f'| = 0.35²/8·0.47 = 0.007 of log d.
    assert result.dimension == pytest.approx(run.dimension(0.72), rel=0.02)
    assert result.low is not None
    assert result.high is not None
    assert result.low <= result.dimension <= result.high


def test_few_trainings() -> None:
    """Bracket and bisection: trainings grow with the log of the distance, not with it."""
    near, far = Synthetic(**EXACT), Synthetic(**EXACT)
    one = SearchConfig(steps=100, seeds=1, rates=(1.0,))
    found(near, one)
    found(far, replace(one, start=1_000_000))
    assert dimensions(near)[:3] == [256, 1024, 512]
    assert len(near.asks) <= 8
    assert len(far.asks) <= len(near.asks) + 6


def test_decisive_dimensions_have_every_seed() -> None:
    run = Synthetic(draw=3)
    result = found(run, SearchConfig(steps=100, seeds=4))
    assert result.dimension is not None
    below = max(p.dimension for p in result.curve if p.dimension <= result.dimension)
    above = min(p.dimension for p in result.curve if p.dimension >= result.dimension)
    assert above <= math.sqrt(2.0) * below + 1
    assert {p.dimension: p.seeds for p in result.curve}.items() >= {below: 4, above: 4}.items()


def test_a_dent_is_looked_at_again() -> None:
    """A dimension that fails beyond one that reached is no end of the story: both get every seed."""
    run = Synthetic(dents={512: 0.15, 724: -0.05}, **EXACT)
    result = found(run)
    assert result.verdict == "reached"
    assert {p.dimension for p in result.curve if p.seeds == 3} >= {512} | ({724} & set(dimensions(run)))


def test_never_reached_says_how_far_it_was() -> None:
    run = Synthetic(middle=1e9, **EXACT)
    result = found(run, SearchConfig(steps=100, largest=50_000))
    assert result.verdict == "never reached"
    assert (result.dimension, result.high) == (None, None)
    assert result.low == pytest.approx(50_000)
    assert result.largest_dimension == 50_000
    assert {p.dimension: p.seeds for p in result.curve}[50_000] == 3
    assert not any(t.given_up for t in subspace_trials(result.trials)[50_000])
    assert "50\u202f000" in result.sentence()
    assert "not reached" in result.sentence()


def test_reached_by_the_smallest() -> None:
    result = found(Synthetic(middle=0.01, **EXACT))
    assert result.verdict == "reached by the smallest"
    assert (result.dimension, result.low) == (None, None)
    assert result.high == pytest.approx(4)
    assert (result.curve[0].dimension, result.curve[0].seeds) == (4, 3)


def test_head_alone() -> None:
    """Its metric is 0.6: enough for a share of 0.7, not of 0.9."""
    run = Synthetic(**EXACT)
    enough = found(run, SearchConfig(steps=100, free_head=True, share=0.7))
    assert enough.verdict == "reached by the head alone"
    assert enough.head == pytest.approx(0.6)
    assert [ask.kind for ask in run.asks] == ["full"] * 3 + ["head"] * 3
    more = found(run, SearchConfig(steps=100, free_head=True))
    assert (more.verdict, more.head) == ("reached", pytest.approx(0.6))


def test_above_chance_and_losses() -> None:
    run = Synthetic(**EXACT)
    assert found(run, SearchConfig(steps=100, above_chance=True)).target == pytest.approx(0.77)
    losses = Synthetic(base=-4.0, top=-2.0, noise=0.05, full_noise=0.02)
    result = found(losses, baseline=-4.0, metric_name="negative loss")
    assert result.above_chance
    assert result.target == pytest.approx(-2.2, abs=0.1)  # the reference's mean of three errs by 0.012
    assert result.low is not None
    assert result.low < losses.dimension(-2.2) < (result.high or math.inf)


def test_a_target_below_the_baseline_is_said_to_mean_nothing() -> None:
    result = found(Synthetic(), baseline=0.75)
    assert "reaches that untrained" in result.sentence()
    assert all(ask.give_up_below is None for ask in (trial.ask for trial in result.trials))


@pytest.mark.parametrize("draw", range(8))
def test_ends_whatever_comes(draw: int) -> None:
    """Noise as large as the rise itself, dents, failures: a search is no longer than its dimensions times seeds."""
    wild = Synthetic(noise=0.3, full_noise=0.1, draw=draw, dents={256: 0.2, 1024: -0.3})
    result = found(failing(wild, lambda ask: ask.kind == "subspace" and ask.seed == draw % 3), SearchConfig(steps=100))
    # At ratio √2 no two dimensions stand nearer than its root: 4 to a million are 72 of them at most.
    assert len(result.curve) <= 72
    assert len({trial.ask for trial in result.trials}) == len(result.trials)


# Hopeless trainings ------------------------------------------------------------------------------------------------


def test_hopeless_trainings_stop_early_and_cost_less() -> None:
    run = Synthetic(middle=20_000, **EXACT)
    result = found(run, SearchConfig(steps=100, start=4))
    given_up = [trial for trial in result.trials if trial.given_up]
    assert given_up
    assert all(trial.metric < result.target for trial in given_up)
    assert result.config["runs"] == pytest.approx(sum(trial.steps for trial in result.trials) / 100)


def test_late_learners_are_found_nevertheless() -> None:
    """Where nothing is learnt in the first half every training is given up, but not at the ends of the bracket."""
    result = found(Synthetic(late=True, middle=0.01, **EXACT), SearchConfig(steps=100, largest=4096))
    assert result.verdict == "reached by the smallest"
    result = found(Synthetic(late=True, **EXACT), SearchConfig(steps=100, largest=4096))
    assert result.dimension == pytest.approx(Synthetic(late=True).dimension(0.72), rel=0.02)


def test_failed_trainings_count_as_the_baseline() -> None:
    run = failing(Synthetic(**EXACT), lambda ask: ask.kind == "subspace" and ask.dimension == 512)
    lines: list[str] = []
    result = found(run, say=lines.append)
    assert result.verdict == "reached"
    assert "step 3: the loss is nan" in lines
    assert next(p.mean for p in result.curve if p.dimension == 512) == 0.5
    with pytest.raises(TrainingError, match="nan"):
        found(failing(Synthetic(), lambda ask: ask.kind == "full"))
    with pytest.raises(TrainingError, match="held-out metric is nan"):
        found(lambda ask: replace(Synthetic()(ask), metric=math.nan))


# Learning rates ----------------------------------------------------------------------------------------------------


def test_pilots_find_the_rate() -> None:
    run = Synthetic(best_rate=0.17, **EXACT)  # the rule says 0.01
    result = found(run, SearchConfig(steps=100))
    assert {p.learning_rate for p in result.curve} == {0.16}
    pilots = [ask for ask in run.asks if ask.kind == "pilot"]
    assert all((ask.steps, ask.schedule_steps) == (20, 100) for ask in pilots)
    first = pilots[0].dimension
    for seed in (0, 1):
        mine = [ask for ask in pilots if ask.seed == seed]
        assert sum(ask.dimension == first for ask in mine) == 4  # three factors, and one beyond the end
        later = {ask.dimension for ask in mine} - {first}
        assert later
        assert all(sum(ask.dimension == d for ask in mine) <= 2 for d in later)


def test_a_rate_that_one_seed_does_not_bear_loses() -> None:
    """Seed 0 likes .04 best; seed 1 fails there."""
    hot = failing(
        Synthetic(best_rate=0.04), lambda ask: ask.kind == "pilot" and ask.seed == 1 and (ask.learning_rate or 0) > 0.03
    )
    assert {p.learning_rate for p in found(Synthetic(best_rate=0.04)).curve} == {0.04}
    assert {p.learning_rate for p in found(hot).curve} == {0.01}


def test_one_rate_needs_no_pilot() -> None:
    run = Synthetic()
    found(run, SearchConfig(steps=100, rates=(2.0,)))
    assert {ask.kind for ask in run.asks} == {"full", "subspace"}
    assert {ask.learning_rate for ask in run.asks} == {None, 0.02}


def test_a_failed_pilot_loses() -> None:
    run = failing(Synthetic(best_rate=0.04), lambda ask: ask.kind == "pilot" and (ask.learning_rate or 0) > 0.03)
    assert {p.learning_rate for p in found(run).curve} == {0.01}


def test_ladder_follows_a_rate_that_moves() -> None:
    """A best factor that grows with √d is never lost by more than a step, at two pilots a dimension."""
    ladder = RateLadder((0.25, 1.0, 4.0), lambda d, factor: abs(math.log(factor / math.sqrt(d / 256))))
    for d in (256, 1024, 4096, 16_384, 65_536):
        assert abs(math.log(ladder.factor(d) / math.sqrt(d / 256))) <= math.log(4.0) + 1e-9
        assert len(ladder.tried(d)) <= (3 if d == 256 else 2)


def test_ladder_where_all_fail_takes_the_least() -> None:
    ladder = RateLadder((1.0, 4.0), lambda d, factor: math.inf)
    assert ladder.factor(64) == min(ladder.tried(64)) == 0.25
    assert math.isfinite(ladder.factor(128))


# Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [4, 5, 6.5, 8, 11, 13])
def test_runs_are_never_more_than_allowed(runs: float) -> None:
    run = Synthetic()
    result = found(run, SearchConfig(steps=100, runs=runs))
    assert sum(ask.steps for ask in run.asks) / 100 <= runs
    assert result.config["spent"] == "runs"
    assert result.verdict in ("unfinished", "reached")
    if result.verdict == "reached":  # the bracket at least
        below = max(p.dimension for p in result.curve if p.mean < result.target)
        assert result.low is None or result.low <= below
        assert "ran out" in result.sentence()


def test_budgets_of_both_verdicts() -> None:
    assert found(Synthetic(**EXACT), SearchConfig(steps=100, runs=4)).verdict == "unfinished"
    assert found(Synthetic(**EXACT), SearchConfig(steps=100, runs=8)).verdict == "reached"


def test_minutes() -> None:
    result = found(Synthetic(), SearchConfig(steps=100, minutes=0.2))
    assert result.config["spent"] == "minutes"
    assert 12.0 <= result.config["seconds"] <= 14.0  # the last begins before, and takes two seconds at most


def test_a_grid_is_trained_whole_and_nothing_else() -> None:
    run = Synthetic()
    result = found(run, SearchConfig(steps=100, dimensions=(64, 256, 4096)))
    assert [(p.dimension, p.seeds) for p in result.curve] == [(64, 3), (256, 3), (4096, 3)]
    assert all(ask.give_up_below is None for ask in run.asks)
    assert result.verdict == "reached"


# Journal -----------------------------------------------------------------------------------------------------------


def bytes_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / JSON).read_bytes(), (folder / CSV).read_bytes()


def test_interrupted_anywhere_gives_the_same_bytes(tmp_path: Path) -> None:
    config = SearchConfig(steps=100, free_head=True, seeds=2)
    whole = Synthetic(draw=5)
    found(whole, config).save(tmp_path / "whole")
    expected = bytes_of(tmp_path / "whole")
    for stop in range(len(whole.asks)):
        out = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            found(Synthetic(draw=5, fails_after=stop), config, journal=out)
        rest = Synthetic(draw=5)
        found(rest, config, journal=out).save(out)
        assert rest.asks == whole.asks[stop:]
        assert bytes_of(out) == expected


def test_finished_searches_train_nothing_and_larger_budgets_go_on(tmp_path: Path) -> None:
    short = SearchConfig(steps=100, runs=4)
    run = Synthetic()
    found(run, short, journal=tmp_path)
    again = Synthetic()
    assert found(again, short, journal=tmp_path).verdict == "unfinished"
    assert again.asks == []
    more = Synthetic()
    assert found(more, SearchConfig(steps=100), journal=tmp_path).verdict == "reached"
    assert not set(more.asks) & set(run.asks)


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    first = Synthetic()
    found(first, journal=tmp_path)
    path = tmp_path / NAME
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    again = Synthetic()
    found(again, journal=tmp_path)
    assert again.asks == first.asks[-1:]
    assert path.read_bytes() == content
    path.write_bytes(content[:7])  # not even the first line
    anew = Synthetic()
    found(anew, journal=tmp_path)
    assert anew.asks == first.asks


def test_another_search_is_refused_by_what_differs(tmp_path: Path) -> None:
    found(Synthetic(), told={"model": "tiny"}, journal=tmp_path)
    with pytest.raises(MismatchError, match=r"search\.seeds was 3, is 2.*told\.model was \"tiny\", is \"large\""):
        found(Synthetic(), SearchConfig(steps=100, seeds=2), told={"model": "large"}, journal=tmp_path)
    anew = Synthetic()
    found(anew, SearchConfig(steps=100, seeds=2), told={"model": "large"}, journal=tmp_path, resume=False)
    assert anew.asks


def test_damaged_journals_are_refused(tmp_path: Path) -> None:
    found(Synthetic(), journal=tmp_path)
    path = tmp_path / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    worded = lines[1].replace(b'"metric": 0', b'"metric": "x"')
    assert worded != lines[1]
    for damaged in (
        [lines[0], b"{nonsense\n", *lines[1:]],
        [lines[0], b"{}\n"],
        [lines[0], worded],
        [lines[0], lines[1].replace(b'"seed": 0', b'"seed": []')],
        [lines[0], b"[" * 100_000 + b"\n"],
        [b'{"format": 1}\n'],
        [b"[]\n"],
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(JournalError):
            found(Synthetic(), journal=tmp_path)


def test_one_search_a_folder(tmp_path: Path) -> None:
    with TrialJournal(tmp_path, {}), pytest.raises(JournalBusy):
        found(Synthetic(), journal=tmp_path)


# Arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"share": 0.0}, "share = 0.0"),
        ({"share": 1.1}, "share = 1.1"),
        ({"ratio": 1.0}, "ratio = 1.0"),
        ({"seeds": 0}, "seeds = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"start": 0}, "start = 0"),
        ({"largest": 0}, "largest = 0"),
        ({"rates": ()}, "rates"),
        ({"rates": (1.0, -1.0)}, "rates"),
        ({"rates": (1.0, 1.0)}, "twice"),
        ({"pilot_share": 0.0}, "pilot_share"),
        ({"runs": 3}, "takes 3"),
        ({"runs": 6, "free_head": True}, "takes 6"),
        ({"minutes": 0.0}, "minutes"),
        ({"dimensions": ()}, "dimensions"),
        ({"dimensions": (4, 4)}, "dimensions"),
        ({"dimensions": (0, 4)}, "dimensions"),
        ({"learning_rate": math.nan}, "learning_rate"),
    ],
)
def test_settings_out_of_range(flags: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        SearchConfig(**{"steps": 100, **flags})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"start": 3}, "start = 3: dimensions go from 4"),
        ({"start": 2_000_000}, "start = 2000000.* to 1000000"),
        ({"largest": 2_000_000}, "largest = 2000000"),
        ({"largest": 100, "start": 200}, "start = 200: the largest allowed is 100"),
        ({"dimensions": (2, 16)}, "dimensions = 2"),
        ({"dimensions": (16, 2_000_000)}, "dimensions = 2000000"),
    ],
)
def test_dimensions_that_a_model_has_not(flags: dict[str, object], match: str) -> None:
    run = Synthetic()
    with pytest.raises(UsageError, match=match):
        found(run, SearchConfig(**{"steps": 100, **flags}))  # type: ignore[arg-type]
    assert run.asks == []


def test_start_fits_small_models() -> None:
    run = Synthetic(middle=2.0, **EXACT)
    assert found(run, total=64).config["total"] == 64
    assert dimensions(run)[0] == 64


def test_what_is_said_and_told() -> None:
    lines: list[str] = []
    result = found(Synthetic(), say=lines.append, told={"model": "tiny"})
    assert len(lines) == len(result.trials) == result.config["trainings"]
    assert lines[0].startswith("full fine-tuning, seed 0")
    assert result.config["model"] == "tiny"
    assert result.config["search"]["share"] == 0.9


def test_odd_numbers_of_a_run_are_mended() -> None:
    """A metric that is NaN is a failed training; a loss that is NaN loses."""
    inner = Synthetic(**EXACT)

    def run(ask: Ask) -> Trial:
        trial = inner(ask)
        return replace(trial, metric=math.nan) if ask.dimension == 512 and ask.kind == "subspace" else trial

    result = found(run)
    assert next(p.mean for p in result.curve if p.dimension == 512) == 0.5
    with pytest.raises(UsageError, match="metric_name"):
        search(run, SearchConfig(steps=1), rate_rule=lambda d: 1.0, baseline=0.5, held_out=9, total=9, smallest=1,
               metric_name="F1")  # fmt: skip
