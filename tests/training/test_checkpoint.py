"""A checkpoint comes back bit for bit, or says which file is broken."""

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import some_devices, with_devices

from rlhf_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    checksums,
    load_params,
    save_params,
)
from rlhf_jax.training.mesh import MeshConfig, state_sharding
from rlhf_jax.training.state import init_state

# Orbax leaves coroutines behind when a file cannot be read.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


def make_state(seed: int):
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "b": jnp.float32(rng.normal()),
    }
    state = init_state(params, jax.random.key(seed))
    return state.replace(step=jnp.int32(seed))


def shapes(state, sharding=None):
    if sharding is None:
        sharding = jax.tree.map(lambda x: x.sharding, state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding
    )


def bits(tree):
    def host(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    return jax.tree.map(host, tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


def saved(directory, steps):
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    return sorted((directory / "checkpoints").iterdir())


def restore(directory):
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_latest(shapes(make_state(0)))
    finally:
        checkpoints.close()


def data_files(folder):
    """The files that hold the numbers, largest first."""
    files = [f for f in folder.rglob("*") if f.is_file() and "d" in f.parts]
    return sorted(files, key=lambda f: -f.stat().st_size)


def truncate(folder):
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite(folder):
    for file in data_files(folder):
        file.write_bytes(b"\xff" * file.stat().st_size)


def remove_data(folder):
    for file in data_files(folder):
        file.unlink()


def remove_metadata(folder):
    for file in folder.rglob("*_METADATA"):
        file.unlink()


def flip_a_bit(folder):
    """Of the largest file of numbers."""
    largest = max(folder.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 8
    largest.write_bytes(content)


def remove_item(folder):
    """What an interrupted copy of a run or of its removal leaves."""
    shutil.rmtree(folder / "default")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [truncate, overwrite, remove_data, remove_metadata, remove_item, empty]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_any_flipped_bit_changes_the_checksum_of_its_leaf_alone(dtype):
    rng = np.random.default_rng(0)
    size = jnp.dtype(dtype).itemsize
    for shape in [(), (1,), (7, 5)]:
        raw = rng.integers(0, 2, (*shape, size), dtype=np.uint8)
        leaf = np.ascontiguousarray(raw).view(jnp.dtype(dtype)).reshape(shape)
        tree = {"a": jnp.ones(3), "b": jnp.asarray(leaf)}
        before = np.asarray(checksums(tree))
        for _ in range(4):
            flipped = raw.copy().reshape(-1)
            bit = 1 if dtype == "bool" else 1 << rng.integers(8)
            flipped[rng.integers(flipped.size)] ^= bit
            other = flipped.view(jnp.dtype(dtype)).reshape(shape)
            after = np.asarray(checksums(tree | {"b": jnp.asarray(other)}))
            assert after[0] == before[0] and after[1] != before[1]


def test_damage_to_many_numbers_changes_the_checksum():
    x = jnp.float32(np.random.default_rng(0).normal(size=(64, 32)))
    damaged = [
        -x,
        x[::-1],
        x.T.reshape(64, 32),
        x.at[:2].multiply(-1.0),
        x.at[3].set(0),
    ]
    sums = [int(checksums({"x": y})[0]) for y in (x, *damaged)]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize(
    ("before", "after"), [(8, 1), pytest.param(1, 8, marks=pytest.mark.slow)]
)
def test_a_checkpoint_is_read_where_there_are_other_devices(tmp_path, before, after):
    program = """
import sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from rlhf_jax.training.checkpoint import Checkpoints, load_params, save_params
from rlhf_jax.training.mesh import MeshConfig, state_sharding
folder, what = Path(sys.argv[1]), sys.argv[2]
tree = {"w": jnp.arange(64.0).reshape(8, 8), "key": jax.random.key(3)}
sharding = state_sharding(MeshConfig(fsdp=jax.device_count()).make(), tree)
tree = jax.device_put(tree, sharding)
checkpoints = Checkpoints(folder)
if what == "save":
    checkpoints.save(1, tree)
    save_params(folder / "params", tree)
else:
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    like = jax.tree.map(shape, tree, sharding)
    step, state = checkpoints.restore_latest(like)
    params = load_params(folder / "params", like)
    for found in (state, params):
        assert np.array_equal(found["w"], np.arange(64.0).reshape(8, 8))
    assert step == 1
checkpoints.close()
"""
    for count, what in ((before, "save"), (after, "load")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "x"), what],
            env=with_devices(count),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_was_saved(tmp_path):
    assert restore(tmp_path) is None


def test_a_state_with_its_key_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path, [7])
    step, state = restore(tmp_path)
    assert step == 7
    assert_same(state, make_state(7))
    assert jax.dtypes.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    jax.random.fold_in(state.key, 0)


def test_the_two_newest_are_kept(tmp_path):
    folders = saved(tmp_path, [1, 2, 3])
    assert [f.name for f in folders] == ["step_2", "step_3"]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The save runs in background while the next step reuses the state's memory."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"w": jnp.zeros((512, 512))}
    checkpoints = Checkpoints(tmp_path)
    for i in range(4):
        checkpoints.save(i, state)
        state = step(step(state))
    checkpoints.close()
    like = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    found, restored = Checkpoints(tmp_path).restore_latest(like)
    assert found == 3
    np.testing.assert_array_equal(restored["w"], np.full((512, 512), 6.0))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, capfd):
    folders = saved(tmp_path, [3, 5])
    damage(folders[-1])
    step, state = restore(tmp_path)
    assert step == 3
    assert_same(state, make_state(3))
    told = capfd.readouterr().err
    assert "step_5" in told and "going on from step 3" in told
    checkpoints = Checkpoints(tmp_path)  # the damaged one does not stand in the way
    checkpoints.save(5, make_state(5))
    checkpoints.close()
    step, state = restore(tmp_path)
    assert step == 5
    assert_same(state, make_state(5))


def test_a_flipped_bit_among_the_numbers_names_its_leaf_and_falls_back(tmp_path, capfd):
    """Orbax reads such numbers without a word: found by the checksum alone."""
    rng = np.random.default_rng(0)
    state = {"small": jnp.zeros(3), "large": jnp.float32(rng.normal(size=(64, 300)))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state)
    checkpoints.save(5, state)
    checkpoints.close()
    flip_a_bit(tmp_path / "checkpoints" / "step_5")
    step, restored = Checkpoints(tmp_path).restore_latest(shapes(state))
    assert step == 3
    assert_same(restored, state)
    told = capfd.readouterr().err
    assert "wrong checksum: ['large']" in told and "going on from step 3" in told

    save_params(tmp_path / "params", state)
    flip_a_bit(tmp_path / "params")
    with pytest.raises(CheckpointError, match=r"wrong checksum: \['large'\]"):
        load_params(tmp_path / "params", shapes(state))


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    folders = saved(tmp_path, [3, 5])
    folders[-1].rename(folders[-1].with_name("step_5.orbax-checkpoint-tmp"))
    step, _ = restore(tmp_path)
    assert step == 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_if_all_are_damaged_the_folder_and_the_way_out_are_named(tmp_path, damage):
    for folder in saved(tmp_path, [3, 5]):
        damage(folder)
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "checkpoints") in text and "delete that folder" in text


def test_a_state_moves_to_another_mesh(tmp_path):
    saved(tmp_path, [4])
    like = make_state(0)
    sharding = state_sharding(MeshConfig(fsdp=8).make(), like)
    checkpoints = Checkpoints(tmp_path)
    _, state = checkpoints.restore_latest(shapes(like, sharding))
    checkpoints.close()
    assert_same(state, make_state(4))
    assert state.params["embed"].addressable_shards[0].data.shape == (2, 8)


def test_parameters_cut_over_one_mesh_are_read_over_another(tmp_path):
    """Pieces of tensor and fsdp, one device, replicas: the numbers are the same."""
    params = make_state(1).params
    meshes = [
        MeshConfig(fsdp=2, tensor=4).make(),
        some_devices(1, 1),
        MeshConfig(tensor=2).make(),
    ]
    pieces = [(4, 4), (16, 8), (8, 8)]
    for number, (mesh, piece) in enumerate(zip(meshes, pieces, strict=True)):
        like = shapes(params, state_sharding(mesh, params))
        params = jax.device_put(params, state_sharding(mesh, params))
        if number:
            params = load_params(tmp_path / f"{number - 1}", like)
        assert params["embed"].addressable_shards[0].data.shape == piece
        assert_same(params, make_state(1).params)
        save_params(tmp_path / f"{number}", params)


def test_parameters_come_back_and_replace_older_ones(tmp_path):
    for seed in (1, 2):
        save_params(tmp_path / "params", make_state(seed).params)
    like = shapes(make_state(0).params)
    assert_same(load_params(tmp_path / "params", like), make_state(2).params)


def test_missing_parameters_ask_for_their_stage(tmp_path):
    with pytest.raises(CheckpointError, match="params: no parameters here; run that"):
        load_params(tmp_path / "params", shapes(make_state(0).params))


@pytest.mark.parametrize("damage", [truncate, overwrite, remove_data])
def test_damaged_parameters_name_folder_and_way_out(tmp_path, damage):
    path = tmp_path / "params"
    save_params(path, make_state(1).params)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        load_params(path, shapes(make_state(0).params))
    assert str(path) in str(caught.value) and "run the stage again" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"embed": jnp.zeros((16, 4))},
        {"embed": jnp.zeros((32, 8))},
        {"embed": jnp.zeros((8, 16))},
        {"more": jnp.zeros((3,))},
        {"b": jnp.zeros((1,))},
    ],
)
def test_parameters_of_another_shape_are_refused(tmp_path, change):
    save_params(tmp_path / "params", make_state(1).params)
    like = shapes(make_state(0).params | change)
    with pytest.raises(CheckpointError, match="another shape"):
        load_params(tmp_path / "params", like)


def test_a_missing_leaf_is_another_shape(tmp_path):
    save_params(tmp_path / "params", make_state(1).params)
    like = shapes({"embed": make_state(0).params["embed"]})
    with pytest.raises(CheckpointError, match="another shape"):
        load_params(tmp_path / "params", like)


def test_a_copied_folder_of_parameters_still_reads(tmp_path):
    save_params(tmp_path / "params", make_state(1).params)
    shutil.copytree(tmp_path / "params", tmp_path / "copy")
    like = shapes(make_state(0).params)
    assert_same(load_params(tmp_path / "copy", like), make_state(1).params)


@pytest.mark.parametrize("call", ["save", "wait_until_finished"])
def test_a_disk_that_is_full_is_named_with_the_way_out(tmp_path, monkeypatch, call):
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, call, full)
        with pytest.raises(CheckpointError, match="No space left.*same command") as e:
            checkpoints.save(1, make_state(1))
            checkpoints.close()
        assert str(tmp_path / "checkpoints") in str(e.value)
    checkpoints.close()


LOST = "UNKNOWN: Gloo AllGather failed: Connection reset by peer"


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_another_process_that_ended_is_not_taken_for_a_full_disk_or_a_damaged_file(
    tmp_path, monkeypatch, kind
):
    """Who follows "delete the folder" then would lose what is whole."""
    like = shapes(make_state(0).params)
    save_params(tmp_path / "params", make_state(1).params)

    def lost(*_, **__):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        raise kind(LOST)

    monkeypatch.setattr("rlhf_jax.training.checkpoint.checksums", lost)
    for call in (
        lambda: save_params(tmp_path / "params", make_state(1).params),
        lambda: load_params(tmp_path / "params", like),
    ):
        with pytest.raises(kind, match="Gloo AllGather"):
            call()
        monkeypatch.setattr(jax, "process_count", lambda: 1)


def test_alone_no_other_process_is_to_blame(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError(LOST)

    monkeypatch.setattr("rlhf_jax.training.checkpoint.checksums", broken)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_params(tmp_path / "params", make_state(1).params)
