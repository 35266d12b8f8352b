"""Cached training sees what live training sees; a cache survives kills and refuses other runs."""

import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from inpo_fast import cli
from inpo_fast.training.cache import CachedPairs, CacheWriter, training_key
from inpo_fast.training.encoders import Encoders, ModelFiles
from inpo_fast.training.examine import Rules
from inpo_fast.training.images import Preprocess
from inpo_fast.training.live import LivePairs
from inpo_fast.training.pairs import DataError, Ties
from inpo_fast.training.sources import open_source
from tests.training import samples
from tests.training.test_stored import equal

ROOT = Path(__file__).resolve().parents[2]
SOFT = Rules(samples.BUCKETS, Ties("soft"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    path = samples.write_parquet(folder / "a.parquet", samples.mixed_rows(), row_group_size=3)
    return open_source(path)


def writer(folder, source, model, *, rules=SOFT, dtype=torch.float32, **options):
    return CacheWriter(folder, source, rules, ModelFiles.find(model), dtype=dtype, **options)


def batches(pairs, steps=10, **options):
    order = pairs.order(batch_size=2, seed=5, last="pad")
    return list(
        itertools.islice(pairs.loader(order, proportion_empty_prompts=0.3, **options), steps)
    )


def same(one, other):
    if one.time_ids is None or other.time_ids is None:
        assert one.time_ids is None and other.time_ids is None
        one, other = (replace(batch, time_ids=torch.zeros(1)) for batch in (one, other))
    return equal(one, other)


def contents(folder):
    """Every tensor and the metadata of every shard, and the JSON files."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = (
                file.metadata(),
                {name: file.get_tensor(name) for name in file.keys()},
            )
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}
    return found


def equal_contents(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert value == other[name]
            continue
        assert value[0] == other[name][0] and value[1].keys() == other[name][1].keys()
        assert all(torch.equal(tensor, other[name][1][key]) for key, tensor in value[1].items())
    return True


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_float32_cache_gives_live_training_s_bits(family, source, tmp_path, request):
    model = request.getfixturevalue(family)
    report = writer(tmp_path / "c", source, model).write(shard_size=3)
    cached = CachedPairs(tmp_path / "c", training_key(ModelFiles.find(model), SOFT))
    live = LivePairs(source, SOFT, Encoders.load(ModelFiles.find(model)))
    assert report == cached.report == live.report and len(cached) == len(live) == 8
    assert list(cached.buckets) == list(live.buckets)
    told = batches(live)
    assert all(same(a, b) for a, b in zip(batches(cached), told, strict=True))
    assert (told[0].time_ids is not None) == (family == "sdxl")
    # every pair, both buckets, the tie, dropped captions and both views occur
    assert {i for batch in told for i in batch.index.tolist()} == {0, 1, 2, 4, 5, 6, 8, 9}
    assert {batch.latents.shape[2:] for batch in told} == {(2, 3), (3, 2)}
    assert {p for batch in told for p in batch.label.tolist()} == {0.5, 1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_cache_differs_by_the_rounding_of_what_is_stored(dtype, source, sdxl, tmp_path):
    writer(tmp_path / "c", source, sdxl, dtype=dtype).write()
    live = LivePairs(source, SOFT, Encoders.load(ModelFiles.find(sdxl)))
    cached = CachedPairs(tmp_path / "c")
    half = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * half
    scale = cached.scaling.scale[0].item()
    tight = []
    for batch, exact in zip(batches(cached), batches(live), strict=True):
        for name, value in exact.text.items():
            error = (batch.text[name] - value).abs()
            assert (error <= half * value.abs() + smallest).all()
        # |m̃ + s̃ε − m − sε| ≤ u(|m| + |sε|), and a posterior of random weights has |m|, |sε| < 8
        error = (batch.latents - exact.latents).abs()
        assert (error <= scale * (half * 16 + smallest * 8)).all()
        tight.append(error.max().item())
        assert torch.equal(batch.time_ids, exact.time_ids)
        assert torch.equal(batch.label, exact.label) and torch.equal(batch.index, exact.index)
    assert max(tight) > 0


def test_mirrored_views_are_used_in_half_of_the_epochs(source, sd, tmp_path):
    writer(tmp_path / "c", source, sd).write()
    live = LivePairs(source, SOFT, Encoders.load(ModelFiles.find(sd)))
    cached = CachedPairs(tmp_path / "c")
    views = [cached.read(0, flipped=flipped, empty_prompt=False).mean for flipped in (False, True)]
    assert not torch.equal(*views)
    # the mirrored view is the encoding of the mirrored pixels
    pixels = samples.BUCKETS.view(samples.picture(0), 0, flipped=True).pixels
    loser = samples.BUCKETS.view(samples.picture(1), 0, flipped=True).pixels
    mean, _ = live._encoders.posterior(torch.stack([pixels, loser]), 0)
    assert torch.equal(views[1], mean)
    plain = Rules(Preprocess(samples.BUCKETS.buckets, flip=False), Ties("soft"))
    writer(tmp_path / "plain", source, sd, rules=plain).write()
    size = sum(path.stat().st_size for path in (tmp_path / "c").glob("shard*"))
    assert sum(path.stat().st_size for path in (tmp_path / "plain").glob("shard*")) < size
    unflipped = LivePairs(source, plain, Encoders.load(ModelFiles.find(sd)))
    found = zip(batches(CachedPairs(tmp_path / "plain")), batches(unflipped), strict=True)
    assert all(same(a, b) for a, b in found)


def test_two_spawned_workers_read_the_same(source, sdxl, tmp_path):
    writer(tmp_path / "c", source, sdxl).write(shard_size=2)
    cached = CachedPairs(tmp_path / "c")
    pickle.dumps(cached)
    here = batches(cached)
    assert all(same(a, b) for a, b in zip(batches(cached, num_workers=2), here, strict=True))


def test_live_pairs_with_two_spawned_workers_and_random_crops(source, sdxl):
    rules = Rules(Preprocess(((16, 16),), random_crop=True), Ties("drop"))
    live = LivePairs(source, rules, Encoders.load(ModelFiles.find(sdxl)))
    assert len(live) == 7
    here = batches(live, 8)
    assert all(same(a, b) for a, b in zip(batches(live, 8, num_workers=2), here, strict=True))
    crops = {tuple(ids[2:4].tolist()) for batch in here for ids in batch.time_ids}
    assert len(crops) > 4
    for batch in here:
        # winner and loser have one size here, and so one crop
        assert torch.equal(batch.time_ids[:2], batch.time_ids[2:])


def test_identical_captions_are_stored_once(source, sdxl, tmp_path):
    writer(tmp_path / "c", source, sdxl).write(shard_size=3)
    names = [
        name
        for value in contents(tmp_path / "c").values()
        if isinstance(value, tuple)
        for name in value[1]
        if name.startswith("text.")
    ]
    # captions of the eight pairs: 0 1 tie 0 "" 0 8 blue; "" is there in any case
    captions = {"", "a red circle 0", "a red circle 1", "a tie", "a red circle 8", "blue"}
    assert len(names) == len(set(names)) == 2 * len(captions)


def test_a_cache_of_a_stream_has_the_same_pairs(source, sd, tmp_path):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(samples.mixed_rows()).to_iterable_dataset()
    writer(tmp_path / "a", source, sd).write(shard_size=3)
    writer(tmp_path / "b", open_source(stream), sd).write(shard_size=3)
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one["key.json"].pop("source") != two["key.json"].pop("source")
    assert equal_contents(one, two)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(7))
def test_a_kill_between_any_two_files_is_made_good(at, source, sd, tmp_path, monkeypatch):
    """Files are key, shards 0 … 3, index: die before, or after, the n-th is renamed."""
    writer(tmp_path / "whole", source, sd).write(shard_size=2)
    rename, done = os.replace, 0

    def dying(part, path):
        nonlocal done
        if done == at:
            # a kill leaves the temporary file where it is
            Path(path).with_name("left.tmp").write_bytes(b"half a file")
            raise Killed
        done += 1
        rename(part, path)

    folder = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        if at < 6:
            with pytest.raises(Killed):
                writer(folder, source, sd).write(shard_size=2)
            assert not (folder / "index.json").exists()
        else:
            writer(folder, source, sd).write(shard_size=2)
    if 0 < at < 6:
        with pytest.raises(DataError, match="is unfinished: run inpo-fast cache again"):
            CachedPairs(folder)
    encoded = []
    text = Encoders.text
    monkeypatch.setattr(Encoders, "text", lambda self, c: encoded.append(c) or text(self, c))
    writer(folder, source, sd).write(shard_size=2)
    assert equal_contents(contents(folder), contents(tmp_path / "whole"))
    # nothing that was on the disk was encoded again
    assert len(encoded) == {0: 6, 1: 6, 2: 3, 3: 2, 4: 2, 5: 0, 6: 0}[at]


SLOW = """
import sys, time
from inpo_fast import cli
from inpo_fast.training import cache
add = cache._Shard.add
def slow(self, row, pair):
    time.sleep(0.1)
    add(self, row, pair)
cache._Shard.add = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_sigkill(source, sd, tmp_path):
    arguments = [str(source._files[0]), "--model", str(sd), "--shard_size", "2", "--ties", "soft"]
    arguments += ["--aspect_ratio_buckets", "16,24;24,16", "--dtype", "float32", "--output"]
    folder = tmp_path / "c"
    command = [sys.executable, "-c", SLOW, "cache", *arguments, str(folder)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "shard-00001.safetensors").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "index.json").exists()
    assert cli.main(["cache", *arguments, str(folder)]) == 0
    assert cli.main(["cache", *arguments, str(tmp_path / "whole")]) == 0
    assert equal_contents(contents(folder), contents(tmp_path / "whole"))


def test_a_finished_cache_is_left_alone(source, sd, tmp_path, monkeypatch):
    report = writer(tmp_path / "c", source, sd).write()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}
    monkeypatch.setattr(Encoders, "load", None)
    assert writer(tmp_path / "c", source, sd).write() == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()} == before


# safetensors has an error of its own, with the system's in its text
FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["system", "safetensors"])
def test_a_full_disk_leaves_nothing_half_written(error, source, sd, tmp_path, monkeypatch, capsys):
    import safetensors.torch

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    flags = ["--aspect_ratio_buckets", "16,24;24,16", "--ties", "soft", "--device", "cpu"]
    where = ["--model", str(sd), "--output", str(tmp_path / "c")]
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            writer(tmp_path / "c", source, sd).write()
        shutil.rmtree(tmp_path / "c")
        assert cli.main(["cache", source.name, *where, *flags]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("inpo-fast cache: ") and "free disk space" in said
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["key.json"]
    shutil.rmtree(tmp_path / "c")
    writer(tmp_path / "c", source, sd).write()
    assert len(CachedPairs(tmp_path / "c")) == 8


OTHERS = {
    "buckets": Rules(Preprocess(((24, 16),)), Ties("soft")),
    "flip": Rules(Preprocess(samples.BUCKETS.buckets, flip=False), Ties("soft")),
    "random_crop": Rules(Preprocess(samples.BUCKETS.buckets, random_crop=True), Ties("soft")),
    "ties": Rules(samples.BUCKETS, Ties("drop")),
}
SAID = {
    "buckets": r"preprocess.buckets: the cache has .*16, 24.*, this run \[\[24, 16\]\]",
    "flip": "preprocess.flip: the cache has True, this run False",
    "random_crop": "preprocess.random_crop: the cache has False, this run True",
    "ties": "ties.mode: the cache has soft, this run drop",
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_stale_cache_is_refused_saying_what_differs(what, source, sd, tmp_path):
    writer(tmp_path / "c", source, sd).write()
    files = ModelFiles.find(sd)
    with pytest.raises(DataError, match=rf"c does not fit this run:\n  {SAID[what]}$"):
        CachedPairs(tmp_path / "c", training_key(files, OTHERS[what]))
    if what != "random_crop":
        with pytest.raises(DataError, match=rf"is a cache of something else; .*\n  {SAID[what]}$"):
            writer(tmp_path / "c", source, sd, rules=OTHERS[what])


def test_a_foreign_cache_is_refused(source, sd, sdxl, tmp_path):
    writer(tmp_path / "c", source, sd).write()
    with pytest.raises(DataError, match=r"model.family: the cache has StableDiffusionPipeline, "):
        CachedPairs(tmp_path / "c", training_key(ModelFiles.find(sdxl), SOFT))
    other = samples.save_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(DataError) as caught:
        CachedPairs(tmp_path / "c", training_key(ModelFiles.find(other), SOFT))
    said = [line.partition(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert said == ["model.vae", "model.text_encoder"]
    rows = samples.write_parquet(tmp_path / "b.parquet", [samples.row(0)])
    with pytest.raises(DataError, match="source: the cache has"):
        writer(tmp_path / "c", open_source(rows), sd)
    with pytest.raises(DataError, match=r"\n  dtype: the cache has torch.float32, this run"):
        writer(tmp_path / "c", source, sd, dtype=torch.float16)
    with pytest.raises(DataError, match=r"compute_dtype: the cache has torch.float32, this run"):
        writer(tmp_path / "c", source, sd, compute_dtype=torch.bfloat16)
    key = json.loads((tmp_path / "c" / "key.json").read_text())
    (tmp_path / "c" / "key.json").write_text(json.dumps({**key, "format": 0}))
    with pytest.raises(DataError, match="format: the cache has 0, this run 1"):
        CachedPairs(tmp_path / "c")


def test_the_seed_of_random_ties_belongs_to_the_cache(source, sd, tmp_path):
    rules = [Rules(samples.BUCKETS, Ties("random", seed)) for seed in (0, 1)]
    writer(tmp_path / "c", source, sd, rules=rules[0]).write()
    with pytest.raises(DataError, match=r"ties.seed: the cache has 0, this run 1"):
        CachedPairs(tmp_path / "c", training_key(ModelFiles.find(sd), rules[1]))


def test_folders_that_are_no_cache(source, sd, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"mine is neither empty nor a cache: it has no key.json"):
        writer(tmp_path / "mine", source, sd)
    file = tmp_path / "mine" / "thesis.txt"
    with pytest.raises(DataError, match=r"thesis\.txt is a file; name a folder to write to"):
        writer(file, source, sd)
    with pytest.raises(DataError, match=r"the folder .*thesis\.txt/c cannot be made: .*Not a dir"):
        writer(file / "c", source, sd)
    assert file.read_text() == "years of work"
    for folder in ("mine", "none"):
        with pytest.raises(DataError, match=f"{folder} is no cache: it has no key.json"):
            CachedPairs(tmp_path / folder)


def test_damaged_caches(source, sd, tmp_path):
    writer(tmp_path / "c", source, sd).write(shard_size=3)
    shard = tmp_path / "c" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"shard-00001.safetensors is no readable shard of a cache"):
        CachedPairs(tmp_path / "c")
    shard.unlink()
    with pytest.raises(DataError, match="must have 3 shards, 8 pairs and 6 captions, got 1, 3"):
        CachedPairs(tmp_path / "c")


def test_values_that_are_not_finite_stop_the_cache_and_name_the_pair(
    source, sd, tmp_path, monkeypatch
):
    posterior = Encoders.posterior

    def large(self, pixels, row):
        mean, std = posterior(self, pixels, row)
        return mean * (1e6 if row == 4 else 1), std

    monkeypatch.setattr(Encoders, "posterior", large)
    message = "latents of the pair in row 4 overflow torch.float16: store bfloat16 or float32"
    with pytest.raises(DataError, match=message):
        writer(tmp_path / "c", source, sd, dtype=torch.float16).write(shard_size=1)
    # the pairs before it are kept
    assert len(list((tmp_path / "c").glob("shard-*.safetensors"))) == 3
    assert not (tmp_path / "c" / "index.json").exists()


@pytest.mark.parametrize("command", ["cache", "validate-data"])
def test_fewer_processes_than_none(command, capsys):
    needed = ["--model", "model", "--output", "c"] if command == "cache" else []
    with pytest.raises(SystemExit):
        cli.main([command, "pairs", *needed, "--num_workers", "-1"])
    assert "argument --num_workers: must be at least 0, got -1" in capsys.readouterr().err


def test_nothing_usable(sd, tmp_path):
    rows = [samples.row(0, label=0.5), samples.row(1, jpg_0=b"")]
    source = open_source(samples.write_parquet(tmp_path / "a.parquet", rows))
    drop = Rules(samples.BUCKETS)
    with pytest.raises(DataError, match=r"a.parquet has no usable pair:\n(.*\n)*  row 1 "):
        writer(tmp_path / "c", source, sd, rules=drop).write()
    assert not (tmp_path / "c" / "index.json").exists()
    with pytest.raises(DataError, match=r"a.parquet has no usable pair:\n(.*\n)*  row 1 "):
        LivePairs(source, drop, Encoders.load(ModelFiles.find(sd)))


def test_what_cannot_be_asked_for(source, sd, tmp_path):
    crop = Rules(Preprocess(((16, 16),), random_crop=True))
    with pytest.raises(DataError, match="random_crop cannot be cached"):
        writer(tmp_path / "c", source, sd, rules=crop)
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, got"):
        writer(tmp_path / "c", source, sd, dtype=torch.float64)
    with pytest.raises(DataError, match="shard_size must be at least 1, got 0"):
        writer(tmp_path / "c", source, sd).write(shard_size=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ties", ["soft", "drop"])
def test_whether_labels_are_sure(sd, tmp_path, tied, ties):
    rows = [samples.row(0), samples.row(1, label=0), samples.row(2, label=0.5 if tied else 1)]
    opened = open_source(samples.write_parquet(tmp_path / "a.parquet", rows))
    rules = Rules(samples.BUCKETS, Ties(ties))
    sure = not (tied and ties == "soft")
    assert LivePairs(opened, rules, Encoders.load(ModelFiles.find(sd))).sure == sure
    writer(tmp_path / "c", opened, sd, rules=rules).write()
    assert CachedPairs(tmp_path / "c").sure == sure


def test_live_training_from_a_stream_says_what_to_do(sd):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list([samples.row(0)]).to_iterable_dataset()
    with pytest.raises(DataError, match="is a stream and has no random access: write a cache"):
        LivePairs(open_source(stream), SOFT, None)


def test_training_from_a_cache_imports_no_encoder(source, sd, tmp_path):
    writer(tmp_path / "c", source, sd).write()
    program = """
import sys
for name in ("diffusers", "transformers", "datasets"):
    sys.modules[name] = None
from inpo_fast.training import CachedPairs
pairs = CachedPairs(sys.argv[1])
print(next(pairs.loader(pairs.order(batch_size=2))).latents.shape[0])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "c")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


def test_command(source, sdxl, tmp_path, capsys):
    arguments = ["cache", str(source._files[0]), "--pretrained_model_name_or_path", str(sdxl)]
    arguments += [
        "--output",
        str(tmp_path / "c"),
        "--no_hflip",
        "--num_workers",
        "1",
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "usable pairs    7" in printed
    assert f"The cache is in {tmp_path / 'c'}" in printed
    # the UNet's sample_size is 2
    rules = Rules(Preprocess(((16, 16),), flip=False))
    cached = CachedPairs(tmp_path / "c", training_key(ModelFiles.find(sdxl), rules))
    assert cached.key["dtype"] == "torch.float16" and len(cached) == 7 and not cached.flips
    assert cli.main([*arguments, "--ties", "soft"]) == 1
    assert "inpo-fast cache: " in (said := capsys.readouterr().err)
    assert "ties.mode: the cache has drop, this run soft" in said
    for change, message in [
        (["--device", "gpu7"], "--device gpu7 is not available"),
        (["--model", str(tmp_path)], "is not in diffusers' format"),
        (["--shard_size", "0"], "shard_size must be at least 1"),
    ]:
        output = ["--output", str(tmp_path / "d")]
        assert cli.main([*arguments, *output, *change]) == 1
        assert message in capsys.readouterr().err


def test_the_size_of_a_model_on_the_hub_is_read_from_its_denoiser(sdxl, monkeypatch):
    asked = []

    def fetched(name, *, filename, subfolder, revision, **options):
        asked.append((name, revision))
        return str(sdxl / subfolder / filename)

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", fetched)
    # what is fetched of a model has no denoiser
    files = replace(ModelFiles.find(sdxl), folder=Path("snapshot"))
    assert files.resolution("owner/model", "v1") == 16
    assert asked == [("owner/model", "v1")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "inpo-fast cache: resolution must be given, as the model .* does not say: "),
        (["--resolution", "24"], "must be multiples of 16 for a FluxPipeline, got 24,24"),
        (["--aspect_ratio_buckets", "32,16;16,40"], "of 16 for a FluxPipeline, got 16,40"),
    ],
)
def test_sizes_that_training_would_refuse(source, flags, message, tmp_path, capsys):
    """A pipeline without its denoiser, whose size is not known."""
    model = samples.save_transformer_pipeline(tmp_path / "model", "flux")
    where = ["--model", str(model), "--output", str(tmp_path / "c")]
    assert cli.main(["cache", str(source._files[0]), *where, *flags]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "c").exists()
