"""`reduce_files` does in files what `reduce` does in memory, and goes on after it was stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file

import pyro_bmr as bmr
from pyro_bmr.extend import IndependentFactor, Prior, Site
from pyro_bmr.selection.scores import score
from pyro_bmr.shards import job
from pyro_bmr.shards.rules import Rule, find_lowest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PRIOR = dist.Normal(0.0, 1.0)
SHAPES = {"first": (37, 11), "second": (301,), "third": (2, 3, 5)}
SELECTIONS = [bmr.by_evidence(), bmr.by_evidence(margin=0.7), bmr.top_k(100), bmr.top_k(0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(job, "_CHUNK", 64)


@pytest.fixture
def posterior():
    """Of few different numbers, so that many ΔF are equal."""
    return {
        name: (torch.randint(-3, 4, shape) / 4, torch.randint(1, 4, shape) / 8)
        for name, shape in SHAPES.items()
    }


def write(folder, posterior, to_width=lambda scale: scale, kind="scale"):
    """A shard for each site, which has something else in it."""
    folder.mkdir(exist_ok=True)
    paths = []
    for name, (loc, scale) in posterior.items():
        paths.append(folder / f"{name}.safetensors")
        tensors = {f"{name}.loc": loc, f"{name}.{kind}": to_width(scale)}
        tensors[f"{name}.step"] = loc[:1].clone()
        save_file(tensors, paths[-1], {"format": "pt"})
    return paths


def write_raw(path, tensors, padding=0):
    """As other writers do: in the order of the tensors, at any byte."""
    kinds = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        start = len(data)
        data += tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [start, len(data)]
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def in_memory(posterior, select):
    log_prior = dist.Normal(0.0, torch.ones((), dtype=torch.float64)).log_prob(torch.tensor(0.0))
    factors = tuple(
        IndependentFactor(Site(name, loc.shape), loc, scale, prior=Prior(log_prior))
        for name, (loc, scale) in posterior.items()
    )
    scores = score(factors)
    masks = select(scores)
    return masks, {n: float(scores.delta_f[n].double()[~masks[n]].sum()) for n in masks}


def read(out):
    masks = {}
    for name in SHAPES:
        masks |= bmr.read_masks(out / f"{name}.masks.safetensors")
    return masks


@pytest.mark.parametrize("select", SELECTIONS, ids=repr)
def test_masks_and_sums_are_those_in_memory(posterior, select, tmp_path):
    table = bmr.reduce_files(
        write(tmp_path / "in", posterior), tmp_path / "out", prior=PRIOR, select=select
    )
    masks, delta_f = in_memory(posterior, select)
    found = read(tmp_path / "out")
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(found[name], mask)
        assert table.delta_f[name] == pytest.approx(delta_f[name], rel=1e-9)
        assert table.kept[name] == mask.sum()
    assert table.elements.sum() == sum(mask.numel() for mask in masks.values())


def test_a_guide_of_five_million_weights(tmp_path, monkeypatch):
    monkeypatch.undo()
    size = 5_000_000

    def model():
        pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    guide = AutoNormal(model, init_loc_fn=lambda _: 0.2 * torch.randn(size), init_scale=0.05)
    guide()
    with torch.no_grad():
        guide.scales.w_unconstrained += torch.randn(size)
    result = bmr.reduce(guide)
    (path,) = write(tmp_path / "in", {"w": (guide.locs.w.detach(), guide.scales.w.detach())})
    table = bmr.reduce_files(path, tmp_path / "out", prior=PRIOR)
    masks = bmr.read_masks(tmp_path / "out" / "w.masks.safetensors")
    assert torch.equal(masks["w"], result.masks["w"])
    assert table.delta_f["w"] == pytest.approx(result.delta_f, rel=1e-9)
    assert 0.1 < result.sparsity < 0.9


WIDTHS = {
    "scale": (lambda scale: scale, 0.0),
    "log_scale": (torch.log, -torch.inf),
    "variance": (torch.square, 0.0),
    "precision": (lambda scale: scale**-2, torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", WIDTHS)
def test_copies_are_zero_where_masks_are_and_else_as_they_were(posterior, kind, dtype, tmp_path):
    to_width, at_zero = WIDTHS[kind]
    posterior = {n: (loc.to(dtype), scale.to(dtype)) for n, (loc, scale) in posterior.items()}
    paths = write(tmp_path / "in", posterior, to_width, kind)
    names = {"location": "{}.loc", kind: "{}." + kind}
    bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR, names=names)
    masks = read(tmp_path / "out")
    for path in paths:
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        mask = masks[path.stem]
        assert 0 < mask.sum() < mask.numel()
        assert torch.equal(after[f"{path.stem}.loc"], before[f"{path.stem}.loc"].where(mask, 0))
        width = before[f"{path.stem}.{kind}"].where(mask, at_zero)
        assert torch.equal(after[f"{path.stem}.{kind}"], width)
        assert torch.equal(after[f"{path.stem}.step"], before[f"{path.stem}.step"])
    expected, _ = in_memory(
        {n: tuple(t.double() for t in p) for n, p in posterior.items()}, bmr.by_evidence()
    )
    agree = sum(int((masks[n] == expected[n]).sum()) for n in masks)
    assert agree >= 0.99 * sum(mask.numel() for mask in masks.values()), "but for rounding"


def test_locations_and_scales_may_be_in_different_files(posterior, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for key, index in {"loc": 0, "scale": 1}.items():
        tensors = {f"{name}.{key}": pair[index] for name, pair in posterior.items()}
        save_file(tensors, folder / f"{key}.safetensors")
    paths = [folder / "scale.safetensors", folder / "loc.safetensors"]
    bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)
    masks = bmr.read_masks(tmp_path / "out" / "loc.masks.safetensors")
    scales = load_file(tmp_path / "out" / "scale.safetensors")
    for name, mask in masks.items():
        assert torch.equal(scales[f"{name}.scale"] > 0, mask)


def test_the_prior_may_be_one_for_each_site(posterior, tmp_path):
    paths = write(tmp_path / "in", posterior)
    priors = {name: dist.Normal(0.0, 1.0 + i) for i, name in enumerate(SHAPES)}
    table = bmr.reduce_files(paths, tmp_path / "out", prior=priors.get)
    for name, prior in priors.items():
        one = bmr.reduce_files(
            tmp_path / "in" / f"{name}.safetensors", tmp_path / name, prior=prior
        )
        assert one.delta_f[name] == table.delta_f[name]


@pytest.mark.parametrize("stop_at", range(6))
@pytest.mark.parametrize("select", [bmr.by_evidence(), bmr.top_k(100)], ids=repr)
def test_what_was_stopped_goes_on(posterior, select, stop_at, tmp_path, monkeypatch):
    """Before each of the six files is written."""
    paths = write(tmp_path / "in", posterior)
    options = {"prior": PRIOR, "select": select}
    whole = bmr.reduce_files(paths, tmp_path / "whole", **options)
    replace_file, begun = job.replace_file, []

    def stopping(path):
        begun.append(path)
        if len(begun) > stop_at:
            raise KeyboardInterrupt
        return replace_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(job, "replace_file", stopping)
        patch.setattr("pyro_bmr.shards.masks.replace_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            bmr.reduce_files(paths, tmp_path / "out", **options)
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*")}
    assert len(there) == stop_at
    assert bmr.reduce_files(paths, tmp_path / "out", **options).equals(whole)
    for path in (tmp_path / "whole").iterdir():
        again = tmp_path / "out" / path.name
        assert again.read_bytes() == path.read_bytes()
        assert there.get(path.name, again.stat().st_mtime_ns) == again.stat().st_mtime_ns


def test_nothing_is_written_where_a_shard_is_missing_or_not_whole(posterior, tmp_path):
    paths = write(tmp_path / "in", posterior)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"second\.safetensors is no whole file"):
        bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"second\.safetensors is not there"):
        bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("location", "scale"), [(torch.nan, 0.1), (0.1, 0.0), (0.1, torch.inf)])
def test_numbers_that_are_none_are_named(posterior, location, scale, tmp_path):
    posterior["second"][0][200], posterior["second"][1][200] = location, scale
    paths = write(tmp_path / "in", posterior)
    with pytest.raises(ValueError, match=r"second has the location .* at \(200,\) in .*second"):
        bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)


def test_copies_without_masks_are_not_taken_for_results(posterior, tmp_path):
    paths = write(tmp_path / "in", posterior)
    bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)
    (tmp_path / "out" / "second.masks.safetensors").unlink()
    with pytest.raises(ValueError, match="masks are missing there"):
        bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR, select=bmr.by_evidence())
    links = tmp_path / "links"
    links.mkdir()
    (links / paths[0].name).symlink_to(paths[0])
    with pytest.raises(ValueError, match="another folder"):
        bmr.reduce_files(links / paths[0].name, links, prior=PRIOR)


@pytest.mark.parametrize("kind", WIDTHS)
def test_copies_are_not_reduced_again(posterior, kind, tmp_path):
    to_width, _ = WIDTHS[kind]
    paths = write(tmp_path / "in", posterior, to_width, kind)
    options = {"prior": PRIOR, "names": {"location": "{}.loc", kind: "{}." + kind}}
    bmr.reduce_files(paths, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="pruned by reduce_files, give the shards that"):
        bmr.reduce_files(tmp_path / "out" / paths[0].name, tmp_path / "again", **options)
    assert not (tmp_path / "again").exists()


def test_a_file_of_masks_tells_of_its_own_shard_alone(posterior, tmp_path):
    """Or many shards of many sites would have masks that are mostly settings."""
    paths = write(tmp_path / "in", posterior)
    bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)
    assert b"second" not in (tmp_path / "out" / "first.masks.safetensors").read_bytes()


def test_ties_go_by_the_names_of_sites(tmp_path):
    """Whatever the order in the file."""
    names = ["b.9", "a", "b.10", "b-1", "__metadata__"]
    posterior = {name: (torch.full((5,), 0.5), torch.full((5,), 0.25)) for name in names}
    tensors = {f"{name}.loc": loc for name, (loc, _) in posterior.items()}
    tensors |= {f"{name}.scale": scale for name, (_, scale) in posterior.items()}
    write_raw(tmp_path / "shard", tensors)
    table = bmr.reduce_files(tmp_path / "shard", tmp_path / "out", prior=PRIOR, select=bmr.top_k(8))
    assert list(table.index) == sorted(names)
    masks, _ = in_memory({name: posterior[name] for name in sorted(names)}, bmr.top_k(8))
    found = bmr.read_masks(tmp_path / "out" / "shard.masks.safetensors")
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("padding", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_may_begin_at_any_byte(posterior, dtype, padding, tmp_path):
    loc, scale = (tensor.to(dtype) for tensor in posterior["first"])
    tensors = {"w.loc": loc, "flag": torch.tensor([True]), "w.scale": scale}
    write_raw(tmp_path / "odd", tensors, padding)
    save_file(tensors, tmp_path / "even")
    for name in ("odd", "even"):
        bmr.reduce_files(tmp_path / name, tmp_path / "out", prior=PRIOR)
    odd, even = (load_file(tmp_path / "out" / name) for name in ("odd", "even"))
    assert all(torch.equal(odd[key], even[key]) for key in tensors)
    assert 0 < (even["w.loc"] != 0).sum() < loc.numel()
    odd, even = (
        bmr.read_masks(tmp_path / "out" / f"{n}.masks.safetensors") for n in ("odd", "even")
    )
    assert torch.equal(odd["w"], even["w"])


OTHERS = {torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.bool: "BOOL"}


@pytest.mark.parametrize("part", ["loc", "scale"])
@pytest.mark.parametrize("dtype", OTHERS)
def test_numbers_of_other_kinds_are_refused_before_anything_is_written(
    posterior, dtype, part, tmp_path
):
    paths = write(tmp_path / "in", posterior)
    tensors = load_file(paths[-1])
    tensors[f"third.{part}"] = tensors[f"third.{part}"].to(dtype)
    save_file(tensors, paths[-1])
    message = (
        rf"third\.{part} in .*third\.safetensors has the dtype {OTHERS[dtype]}\. Expected one of"
    )
    with pytest.raises(ValueError, match=message):
        bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)
    assert not (tmp_path / "out").exists()


BARE = {
    "a bare location": {"location": "{}", "scale": "{}.scale"},
    "a bare scale": {"location": "{}.mean", "scale": "{}"},
    "one within the other": {"location": "net.{}", "scale": "net.{}.scale"},
}


@pytest.mark.parametrize("names", BARE.values(), ids=BARE)
def test_a_pattern_may_take_in_the_other(posterior, names, tmp_path):
    """What has no partner, such as counts and means of batch norm, stays as it is."""
    loc, scale = posterior["first"]
    other = {names["location"].format("count"): torch.tensor(3)}
    if "mean" in names["location"]:
        other = {"count": torch.tensor(3)}
    tensors = {names["location"].format("w"): loc, names["scale"].format("w"): scale, **other}
    save_file(tensors, tmp_path / "shard")
    with pytest.warns(UserWarning, match=r"count'\] have no .* and stay as they are, 1 in all"):
        table = bmr.reduce_files(tmp_path / "shard", tmp_path / "out", prior=PRIOR, names=names)
    assert list(table.index) == ["w"]
    masks, _ = in_memory({"w": (loc, scale)}, bmr.by_evidence())
    after = load_file(tmp_path / "out" / "shard")
    assert torch.equal(after[names["location"].format("w")], loc.where(masks["w"], 0))
    assert all(torch.equal(after[name], value) for name, value in other.items())


def test_a_width_without_a_location_is_refused_beside_a_bare_one(posterior, tmp_path):
    loc, scale = posterior["first"]
    save_file({"w": loc, "w.scale": scale, "v.scale": scale.clone()}, tmp_path / "shard")
    names = {"location": "{}", "scale": "{}.scale"}
    with pytest.raises(ValueError, match=r"a location for each scale; \['v\.scale'\] have none"):
        bmr.reduce_files(tmp_path / "shard", tmp_path / "out", prior=PRIOR, names=names)
    save_file({"w": loc, "v": loc.clone()}, tmp_path / "shard")
    with pytest.raises(ValueError, match=r"a scale for each location; \['v', 'w'\] have none"):
        bmr.reduce_files(tmp_path / "shard", tmp_path / "out", prior=PRIOR, names=names)


def test_paths_may_be_any_iterable_that_has_an_order(posterior, tmp_path):
    paths = write(tmp_path / "in", posterior)
    table = bmr.reduce_files((path for path in paths), tmp_path / "out", prior=PRIOR)
    assert list(table.index) == list(SHAPES)
    for some in (set(paths), frozenset(paths), dict.fromkeys(paths), dict.fromkeys(paths).keys()):
        with pytest.raises(TypeError, match="one file or more, in an order"):
            bmr.reduce_files(some, tmp_path / "out", prior=PRIOR)
    with pytest.raises(ValueError, match=r"those in a folder are sorted\("):
        bmr.reduce_files(tmp_path / "in", tmp_path / "out", prior=PRIOR)
    with pytest.raises(ValueError, match="one file or more"):
        bmr.reduce_files([], tmp_path / "out", prior=PRIOR)


def test_other_settings_need_another_folder(posterior, tmp_path):
    paths = write(tmp_path / "in", posterior)
    bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR)
    with pytest.raises(ValueError, match="other shards or settings"):
        bmr.reduce_files(paths, tmp_path / "out", prior=PRIOR, select=bmr.top_k(1))
    with pytest.raises(ValueError, match="other shards or settings"):
        bmr.reduce_files(paths[:2], tmp_path / "out", prior=PRIOR)


BAD = {
    "a selection that looks at all": ({"select": bmr.exhaustive()}, TypeError, "by_evidence"),
    "a prior of nothing": (
        {"prior": lambda name: None},
        TypeError,
        r"prior\('first'\)=None\. Expected a Normal",
    ),
    "a prior for some sites": ({"prior": {"first": PRIOR}}, TypeError, "a function from the name"),
    "a class of priors": ({"prior": dist.Normal}, TypeError, "a function from the name"),
    "a prior of another kind": ({"prior": dist.Laplace(0.0, 1.0)}, TypeError, "a Normal"),
    "a prior of many": ({"prior": dist.Normal(torch.zeros(2), 1.0)}, ValueError, "one location"),
    "no pattern": ({"names": {"location": "{}.loc"}}, ValueError, "patterns with one {}"),
    "one pattern for both": (
        {"names": {"location": "{}.loc", "scale": "{}.loc"}},
        ValueError,
        "patterns with one {}",
    ),
    "a pattern of nothing": (
        {"names": {"location": "{}.mean", "scale": "{}.scale"}},
        ValueError,
        r"\['first.scale', 'second.scale', 'third.scale'\] have none",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused(posterior, options, error, message, tmp_path):
    paths = write(tmp_path / "in", posterior)
    with pytest.raises(error, match=message):
        bmr.reduce_files(paths, tmp_path / "out", **{"prior": PRIOR} | options)
    assert not (tmp_path / "out").exists()


def test_files_are_not_written_over(posterior, tmp_path):
    paths = write(tmp_path / "in", posterior)
    with pytest.raises(ValueError, match="another folder"):
        bmr.reduce_files(paths, tmp_path / "in", prior=PRIOR)
    for other in (paths[0], tmp_path / "first.bin", tmp_path / "first.masks.safetensors"):
        with pytest.raises(ValueError, match="names that differ"):
            bmr.reduce_files([paths[0], other], tmp_path / "out", prior=PRIOR)
    twice = tmp_path / "twice.safetensors"
    twice.write_bytes(paths[0].read_bytes())
    with pytest.raises(ValueError, match=r"first\.loc.*each tensor in one file"):
        bmr.reduce_files([*paths, twice], tmp_path / "out", prior=PRIOR)
    with pytest.raises(ValueError, match="holds no masks"):
        bmr.read_masks(paths[0])
    (tmp_path / "notes.txt").write_text("no file of tensors")
    with pytest.raises(ValueError, match="holds no masks"):
        bmr.read_masks(tmp_path / "notes.txt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 250, 499, 500, 1000])
def test_the_lowest_are_found_exactly(dtype, count):
    values = torch.randn(1000, dtype=dtype)
    values[:500] = torch.randint(-3, 4, (500,)) / 2
    values[10:20] = -0.0
    rule = find_lowest(lambda: iter(values.split(64)), count, dtype)
    assert rule.threshold == values.sort().values[count - 1]
    kept = []
    for part in values.split(64):
        mask, rule = rule.apply(part)
        kept.append(mask)
    kept = torch.cat(kept)
    assert int((~kept).sum()) == count
    assert values[~kept].max() <= values[kept].min() if count < 1000 else True


def test_what_overflows_never_goes():
    values = torch.tensor([torch.inf, -1.0, 2.0, torch.inf])
    mask, _ = find_lowest(lambda: iter([values]), 4, torch.float32).apply(values)
    assert mask.tolist() == [True, False, False, True]


def test_no_ties_are_left_over():
    mask, rule = Rule(0.0, 2).apply(torch.tensor([0.0, -1.0, 0.0, 0.0]))
    assert mask.tolist() == [False, False, False, True]
    assert rule.ties == 0


@pytest.mark.rare
def test_memory_does_not_grow_with_a_shard(tmp_path):
    """Locations and scales would take 460 MiB."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import shards
        from pathlib import Path
        from pyro.distributions import Normal
        shards.SHARD = 60_000_000
        path = shards.write(Path({str(tmp_path)!r}) / "shard.safetensors", 0)
        with shards.Peak() as peak:
            shards.bmr.reduce_files(path, path.parent / "out", prior=Normal(0.0, 1.0))
        print(peak.mib - peak.before)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 150


def test_memory_at_200_million_weights():
    """As `benchmarks/shards.py` measured it; the page says so."""
    table = pd.read_csv(BENCHMARKS / "shards.csv")
    assert (table.weights == 200_000_000).all()
    assert (table["peak (MiB)"] < 512).all()
