"""The join of a whole catalogue on arrays: candidates, scores, thresholds and groups."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from match_worlds import catalogue_of, planted

from tongkuan.base.metrics import best_threshold
from tongkuan.match import candidates, groups
from tongkuan.match.candidates import (
    Neighbours,
    build_index,
    collapse,
    could_match,
    exact_neighbours,
    index_neighbours,
    local_means,
    nearest,
    recall_of,
    unit_rows,
)
from tongkuan.match.groups import facts, group
from tongkuan.match.options import Engine, Grouping, Options
from tongkuan.match.scores import all_pairs, candidate_pairs, exact_cosines, exact_scores
from tongkuan.match.search import FEW, plan_search
from tongkuan.match.threshold import Labelled, from_labels, from_sample, warning
from tongkuan.model.towers import pair_scores

# ---------------------------------------------------------------------------------------------------------------------
# Candidates


def test_neighbours_are_those_of_a_plain_sort_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of queries and of the base that divide nothing evenly."""
    monkeypatch.setattr(candidates, "QUERIES", 37)
    monkeypatch.setattr(candidates, "BASE", 53)
    embeddings, _ = planted(300)
    units = unit_rows(embeddings).astype(np.float64)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -2)
    wanted = np.argsort(-cosines, axis=1)[:, :7]
    found = exact_neighbours(embeddings, np.arange(300, dtype=np.int32), 7)
    assert (found.rows == wanted).all()
    assert np.allclose(found.cosines, np.take_along_axis(cosines, wanted, 1), atol=1e-6)


def test_of_equal_cosines_the_lower_row_comes_first_and_a_listing_is_never_its_own_neighbour() -> None:
    embeddings = np.tile(np.eye(4, dtype=np.float32), (3, 1)) * np.repeat([1, 2, 4], 4)[:, None].astype(np.float32)
    found = exact_neighbours(embeddings, np.arange(12, dtype=np.int32), 2)
    wanted = [[other for other in range(row % 4, 12, 4) if other != row] for row in range(12)]
    assert found.rows.tolist() == wanted


@given(st.lists(st.floats(-1, 1, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 0.5]), max_size=12))
def test_what_was_found_is_sorted_by_cosine_and_row_with_nothing_last(cosines: list[float]) -> None:
    """In whatever order it was found; a place without a row and the listing itself, 3, count as nothing."""
    rows = [number * 7 % 12 - 1 for number in range(len(cosines))]
    found = nearest(np.array([cosines], np.float32), np.array([rows], np.int32), np.array([3], np.int32), 5)
    wanted = sorted((-cosine, row) for cosine, row in zip(cosines, rows, strict=True) if row not in (-1, 3))[:5]
    wanted += [(np.inf, -1)] * (min(len(cosines), 5) - len(wanted))
    assert found.rows[0].tolist() == [row for _, row in wanted]
    assert found.cosines[0].tolist() == [-cosine for cosine, _ in wanted]
    assert not np.signbit(found.cosines[found.cosines == 0]).any(), "one zero, whatever it came as"


def test_fewer_listings_than_asked_for_leave_places_empty() -> None:
    embeddings, _ = planted(3)
    found = exact_neighbours(embeddings, np.arange(3, dtype=np.int32), 5)
    assert (found.rows[:, 2:] == -1).all() and np.isneginf(found.cosines[:, 2:]).all()
    assert (found.rows[:, :2] >= 0).all()


def test_an_index_finds_what_recall_asks_for_and_says_how_much_it_found() -> None:
    embeddings, _ = planted(2000, width=8, group=2, noise=0.5)
    rows = np.arange(2000, dtype=np.int32)
    search = partial(exact_neighbours, embeddings, k=20)
    pairs = could_match(search, rows, search(rows))
    probes = []
    for recall in (0.5, 0.99, 1.0):
        index = build_index(embeddings, 20, recall)
        probes.append(index.probes)
        assert index.recall >= recall
        found = recall_of(partial(index_neighbours, embeddings, index, k=20), *pairs)
        assert found == pytest.approx(index.recall, abs=0.03)
    assert probes == sorted(probes) and probes[0] < probes[-1]


def test_where_codes_tell_too_little_more_listings_are_looked_at_exactly() -> None:
    generator = np.random.default_rng(0)
    centres, noise = generator.normal(size=(2, 64)), generator.normal(size=(1000, 64))
    index = build_index((np.repeat(centres, 500, axis=0) + 0.02 * noise).astype(np.float32), 50, 0.99)
    assert index.recall >= 0.99 and index.exact > candidates.FIRST_EXACT


def test_recall_counts_pairs_that_are_nearer_to_each_other_than_to_their_neighbourhoods() -> None:
    embeddings, products = planted(400, group=4, noise=0.2)
    rows = np.arange(400, dtype=np.int32)
    found = exact_neighbours(embeddings, rows, 20)
    means = local_means(found)
    left, right = could_match(partial(exact_neighbours, embeddings, k=20), rows, found)
    assert (2 * exact_cosines(embeddings, left, right) > means[left] + means[right]).all()
    assert (products[left] == products[right]).sum() == 400 * 3, "all mates"
    assert len(left) < 1.2 * 3 * 400, "and hardly anything else"


def test_a_pair_is_found_when_either_names_the_other() -> None:
    named = Neighbours(np.zeros((3, 1), np.float32), np.array([[1], [2], [0]], np.int32))
    left, right = (np.array(rows, np.int32) for rows in ([0, 1, 2, 0], [1, 0, 1, 0]))
    assert recall_of(lambda rows: Neighbours(named.cosines[rows], named.rows[rows]), left, right) == 0.75
    assert recall_of(lambda rows: named, left[:0], right[:0]) == 1


def test_without_a_pair_that_could_match_the_nearest_count() -> None:
    embeddings = np.eye(16, dtype=np.float32)
    rows = np.arange(16, dtype=np.int32)
    found = exact_neighbours(embeddings, rows, 5)
    assert len(could_match(partial(exact_neighbours, embeddings, k=5), rows, found)[0]), "all as near as each other"


def test_an_index_is_the_same_when_built_again_and_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, _ = planted(3000)
    rows, found = np.arange(3000, dtype=np.int32), []
    for cores in (1, 2):
        monkeypatch.setattr(candidates, "available_cores", lambda cores=cores: cores)
        neighbours = index_neighbours(embeddings, build_index(embeddings, 10, 0.9), rows, 10)
        found.append((neighbours.cosines.tobytes(), neighbours.rows.tobytes()))
    assert found[0] == found[1]


def test_ten_times_the_listings_are_planned_to_take_an_index_10_to_14_times_as_long_and_an_exact_search_100() -> None:
    def seconds(count: int, engine: Engine) -> float:
        return plan_search(Options(engine=engine), np.zeros(count, np.int64), 256).seconds

    assert 10 < seconds(1_000_000, "faiss") / seconds(100_000, "faiss") < 14
    assert seconds(1_000_000, "exact") / seconds(100_000, "exact") == pytest.approx(100)
    assert seconds(1_000_000, "auto") == seconds(1_000_000, "faiss")
    few = np.repeat(np.arange(2), FEW - 1)
    assert plan_search(Options(engine="faiss"), few, 256).seconds < seconds(2 * FEW - 2, "exact")


def test_a_search_leaves_torch_its_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, _ = planted(300)
    before = torch.get_num_threads()
    monkeypatch.setattr(candidates, "available_cores", lambda: before + 1)
    index_neighbours(embeddings, build_index(embeddings, 10, 0.9), np.arange(300, dtype=np.int32), 10)
    assert torch.get_num_threads() == before


def test_identical_listings_are_one_and_keep_the_order_of_their_first() -> None:
    embeddings, _ = planted(5)
    firsts, numbers = collapse(embeddings[[3, 1, 3, 0, 1, 3]])
    assert firsts.tolist() == [0, 1, 3] and numbers.tolist() == [0, 1, 0, 2, 1, 0]


def test_two_listings_of_one_sum_are_still_two(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros:
        def integers(self, *_: object, size: int, dtype: type) -> np.ndarray:
            return np.zeros(size, dtype)

    monkeypatch.setattr(np.random, "default_rng", lambda _: Zeros())
    firsts, numbers = collapse(np.eye(3, dtype=np.float32)[[2, 0, 2, 1]])
    assert firsts.tolist() == [0, 1, 3] and numbers.tolist() == [0, 1, 0, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_the_exact_join_is_the_double_loop_over_pair_scores() -> None:
    """2,000 listings; a threshold below every scaled cosine leaves the score alone to decide."""
    embeddings, _ = planted(2000)
    pairs = all_pairs(catalogue_of(embeddings), np.arange(2000, dtype=np.int32), 9.0, -4.1)
    wanted = []
    for row in range(1999):
        scores = pair_scores(np.broadcast_to(embeddings[row], (1999 - row, 16)), embeddings[row + 1 :])
        wanted += [(row, row + 1 + other, scores[other]) for other in np.flatnonzero(scores > 9.0)]
    assert sorted(zip(pairs.left.tolist(), pairs.right.tolist(), pairs.scores.tolist(), strict=True)) == wanted
    assert len(wanted) > 1000


def test_candidates_of_all_listings_give_each_match_once_and_all_that_looking_at_every_pair_gives() -> None:
    embeddings, _ = planted(600)
    catalogue, rows = catalogue_of(embeddings), np.arange(600, dtype=np.int32)
    wanted = all_pairs(catalogue, rows, -5.0, 0.0)
    neighbours = exact_neighbours(embeddings, rows, 50)
    blocks = [candidate_pairs(catalogue, neighbours, slice(start, start + 200), -5.0, 0.0) for start in (0, 200, 400)]
    found = [row for part in blocks for row in zip(part.left, part.right, part.scores, part.scaled, strict=True)]
    assert sorted(found) == sorted(zip(wanted.left, wanted.right, wanted.scores, wanted.scaled, strict=True))
    assert len(found) == len({(a, b) for a, b, *_ in found}) > 500


def test_a_match_that_only_one_of_the_two_names_is_found() -> None:
    """Many listings lie about one; it names only the nearest of them."""
    generator = np.random.default_rng(0)
    embeddings = (1 + 0.2 * generator.normal(size=(40, 8))).astype(np.float32)
    catalogue, rows = catalogue_of(embeddings), np.arange(40, dtype=np.int32)
    few = exact_neighbours(embeddings, rows, 3)
    found = candidate_pairs(catalogue, few, slice(0, 40), -99.0, -4.1)
    named = {frozenset((row, int(other))) for row in range(40) for other in few.rows[row]}
    assert {frozenset(pair) for pair in zip(found.left.tolist(), found.right.tolist(), strict=True)} == named


def test_the_scaled_cosine_is_two_cosines_less_both_neighbourhoods() -> None:
    embeddings, _ = planted(100)
    pairs = all_pairs(catalogue_of(embeddings), np.arange(100, dtype=np.int32), -99.0, -4.1)
    units = unit_rows(embeddings).astype(np.float64)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -2)
    means = np.sort(cosines, axis=1)[:, -10:].mean(axis=1)
    wanted = 2 * cosines - means[:, None] - means
    assert np.allclose(pairs.scaled, wanted[pairs.left, pairs.right], atol=1e-6) and len(pairs) == 4950


def test_only_listings_of_one_category_match() -> None:
    embeddings, _ = planted(120, group=6)
    categories = (np.arange(120) % 3).astype(np.int32)
    pairs = all_pairs(catalogue_of(embeddings, categories), np.arange(120, dtype=np.int32), 0.0, -4.1)
    assert len(pairs) and (categories[pairs.left] == categories[pairs.right]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds


def test_pairs_that_nobody_asked_about_count_for_the_whole_catalogue() -> None:
    """One false pair in 45 is nothing among ten listings, and a flood among a million."""
    scaled = np.r_[np.linspace(0.2, 1.0, 9), 0.35, np.full(35, -1.0)]
    same = np.r_[np.ones(9, np.int64), np.zeros(36, np.int64)]
    labelled = Labelled(scaled, same, np.zeros(45, bool), 10)
    small, large = from_labels(labelled, 10, "valid"), from_labels(labelled, 1_000_000, "valid")
    assert small.value < 0.2 and large.value > 0.35
    assert small.source == "labels" and "10 labelled listings of valid" in small.reason
    asked = Labelled(scaled, same, np.arange(45) == 9, 10)
    assert from_labels(asked, 1_000_000, "valid").value < 0.2


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(1, 3)), min_size=1, max_size=12))
def test_a_weight_is_so_many_copies_of_a_pair(rows: list[tuple[int, bool, int]]) -> None:
    scores, labels, weights = (np.array(column) for column in zip(*rows, strict=True))
    scores, labels = scores.astype(np.float64), labels.astype(np.int64)
    copied = best_threshold(np.repeat(scores, weights), np.repeat(labels, weights))
    assert best_threshold(scores, labels, weights.astype(np.float64)) == pytest.approx(copied)


def test_without_labels_the_threshold_is_natural_until_too_much_passes() -> None:
    few = from_sample(np.full(40, 0.1), 10)
    assert few.value == 0 and "4.00 matches a listing" in few.reason and few.source == "sample"
    many = from_sample(np.linspace(0.01, 1.0, 100), 10)
    assert (np.linspace(0.01, 1.0, 100) > many.value).sum() == 50


def test_a_listing_with_more_than_twenty_matches_is_warned_of() -> None:
    assert warning(np.array([20, 3])) == ""
    assert "2 listings have more than 20 matches, the most 31" in warning(np.array([21, 31, 2]))


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def grouped(table: np.ndarray, threshold: float, grouping: Grouping) -> list[int]:
    """Labels from a table of strengths, all above the threshold being pairs."""
    left, right = (side.astype(np.int32) for side in np.nonzero(np.triu(table > threshold, 1)))
    strengths = table[left, right]
    return group(len(table), left, right, strengths, threshold, looked_up(table), grouping).labels.tolist()


def looked_up(table: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What all pairs of some rows have in a table."""
    return lambda rows: table[np.ix_(rows, rows)]


def table_of(num: int, pairs: dict[tuple[int, int], float]) -> np.ndarray:
    table = np.full((num, num), -1.0)
    for (a, b), strength in pairs.items():
        table[a, b] = table[b, a] = strength
    return table


def test_one_wrong_pair_does_not_join_two_groups() -> None:
    two = {(0, 1): 0.9, (0, 2): 0.9, (1, 2): 0.9, (3, 4): 0.8, (3, 5): 0.8, (4, 5): 0.8, (2, 3): 0.3}
    assert grouped(table_of(7, two), 0.0, "average") == [0, 0, 0, 3, 3, 3, 6]


def test_strict_groups_hold_no_pair_below_the_threshold() -> None:
    loose = table_of(3, {(0, 1): 0.9, (1, 2): 0.6, (0, 2): -0.1})
    assert grouped(loose, 0.0, "average") == [0, 0, 0]  # 0.6 and -0.1 are 0.25 on average
    assert grouped(loose, 0.0, "strict") == [0, 0, 2]


def test_too_large_a_component_is_split_by_a_raised_threshold_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST", 4)
    chain = {(row, row + 1): 0.9 if row % 3 else 0.2 for row in range(8)}
    table = table_of(9, chain)
    left, right = (side.astype(np.int32) for side in np.nonzero(np.triu(table > 0, 1)))
    asked: list[int] = []

    def strengths(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return table[np.ix_(rows, rows)]

    found = group(9, left, right, table[left, right], 0.0, strengths)
    assert found.oversized == [9] and max(asked) <= 4
    assert len(set(found.labels.tolist())) > 1


def test_groups_recover_the_planted_products() -> None:
    embeddings, products = planted(400)
    catalogue = catalogue_of(embeddings)
    pairs = all_pairs(catalogue, np.arange(400, dtype=np.int32), -99.0, 0.1)
    units = unit_rows(embeddings)
    scaled = 2 * units @ units.T - catalogue.means[:, None] - catalogue.means
    found = group(400, pairs.left, pairs.right, pairs.scaled, 0.1, looked_up(scaled))
    same = products[:, None] == products
    called = found.labels[:, None] == found.labels
    assert (same & called).sum() > 0.95 * max(same.sum(), called.sum())


def test_facts_count_copies_and_name_the_weakest_score() -> None:
    """Listings 0 and 1 match, 1 and 2 do not; 0 stands for three copies; 3 stands for two of its own; 4 is alone."""
    scores = np.array([[9, 5, 2, 0, 0], [5, 8, 1, 0, 0], [2, 1, 7, 0, 0], [0, 0, 0, 6, 0], [0, 0, 0, 0, 5.0]])
    left, right = np.array([0, 0], np.int32), np.array([1, 2], np.int32)
    found = facts(np.array([0, 0, 0, 3, 4]), np.array([3, 1, 1, 2, 1]), left, right, looked_up(scores))
    assert found.sizes.tolist() == [5, 5, 5, 2, 1]
    assert found.densities.tolist() == [0.9, 0.9, 0.9, 1.0, 1.0]  # 3 among copies, 3 + 3 with them, 9 of 10
    assert found.weakest[:4].tolist() == [1, 1, 1, 6] and np.isnan(found.weakest[4])


def test_scores_and_means_do_not_depend_on_how_pairs_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, _ = planted(50)
    left, right = (side.astype(np.int32) for side in np.triu_indices(50, 1))
    whole = exact_scores(embeddings, left, right)
    monkeypatch.setattr("tongkuan.match.scores.PAIRS_AT_ONCE", 7)
    assert (exact_scores(embeddings, left, right) == whole).all()
    lonely = exact_neighbours(embeddings[:1], np.zeros(1, np.int32), 5)
    assert local_means(lonely).tolist() == [0.0]
