"""A batch in two halves against the whole of it, in float64, and what is left whole."""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib import xla_client

import res2net_jax
from res2net_jax import backend, per_core

pytestmark = pytest.mark.skipif(backend.cores() < 2, reason="for two cores")
SMALL = {"layers": (1, 1), "channels": (16, 32), "zero_init_last": False}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Also where there are more; with clients of the test's own."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:2])
    monkeypatch.setattr(per_core, "_devices", None)
    for name in "NPROC", "PJRT_NPROC":
        monkeypatch.delenv(name, raising=False)
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(per_core, "LEAST_PIXELS", 32 * 32)
    monkeypatch.setattr(per_core, "LEAST_PIXELS_OF_A_BATCH", 2 * 32 * 32)
    monkeypatch.setattr(per_core, "LEAST_PIXELS_OF_A_PART", 4 * 32 * 32)


@pytest.fixture
def halved(monkeypatch):
    """The batches that were taken in halves."""
    seen, call = [], per_core.Halves.__call__
    monkeypatch.setattr(
        per_core.Halves, "__call__", lambda halves, images: seen.append(images.shape) or call(halves, images)
    )
    return seen


def model_of(**options):
    return res2net_jax.create("res2net50_26w_4s", **(SMALL | options)).eval()


def images(*shape, dtype="float32"):
    return np.random.default_rng(0).standard_normal(shape or (4, 32, 32, 3)).astype(dtype)


plain = jax.jit(lambda model, x: model(x))


@pytest.mark.parametrize("options", [{}, {"features_only": True}, {"stem_type": "deep", "attn_layer": "se"}], ids=str)
@pytest.mark.parametrize("batch", [2, 6, 24])  # the last in parts of 3
def test_both_halves_are_those_of_the_whole(batch, options, x64, halved):
    model, x = model_of(param_dtype="float64", **options), images(batch, 32, 48, 3, dtype="float64")
    answers = jax.tree.leaves(res2net_jax.compile(model)(x))
    assert halved == [x.shape]
    for ours, expected in zip(answers, jax.tree.leaves(plain(model, x)), strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        assert np.abs(ours - expected).max() < 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("batch", "side", "sizes"),
    [(8, 32, [4, 4]), (16, 32, 4 * [4]), (20, 32, 4 * [5]), (24, 32, 6 * [4]), (12, 32, [6, 6]), (6, 64, 6 * [1])],
)
def test_one_program_for_several_batches(batch, side, sizes, monkeypatch):
    run, seen = backend.jit(lambda leaves, x: 2 * x[:, 0, 0]), []
    alone = run.alone
    monkeypatch.setattr(run, "alone", lambda leaves, x: seen.append((len(x), *x.devices())) or alone(leaves, x))
    x = images(batch, side, side, 3)
    np.testing.assert_array_equal(per_core.Halves(run, [])(x), 2 * x[:, 0, 0])
    assert seen == list(zip(sizes, len(sizes) // 2 * per_core.devices()))


def test_what_is_too_little_or_cannot_be_cut_stays_whole(halved, monkeypatch):
    run = res2net_jax.compile(model_of())
    monkeypatch.setattr(per_core, "LEAST_PIXELS_OF_A_BATCH", 4 * 32 * 32)
    for shape in (3, 64, 64, 3), (1, 64, 64, 3), (0, 32, 32, 3), (8, 16, 32, 3), (2, 32, 32, 3):
        assert run(images(*shape)).shape == (shape[0], 1000)
    assert not halved
    run(images(4, 32, 32, 3))
    assert len(halved) == 1


def test_what_is_refused_is_refused_whole(halved):
    run = res2net_jax.compile(model_of())
    with pytest.raises(ValueError, match=r"got \[4, 32, 32, 4\]"):
        run(images(4, 32, 32, 4))
    with pytest.raises(TypeError, match="got uint8"):
        run(np.zeros((4, 32, 32, 3), np.uint8))
    assert not halved


def test_part_of_another_program_is_whole(halved):
    run, x = res2net_jax.compile(model_of()), jnp.asarray(images())
    expected = np.asarray(run(x))
    assert len(halved) == 1
    np.testing.assert_allclose(jax.jit(run)(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda y: run(x) + y)(1.0), expected + 1, rtol=1e-4, atol=1e-5)
    assert jax.grad(lambda x: run(x).sum())(x).shape == x.shape
    assert len(halved) == 1


def test_a_batch_on_a_mesh_is_whole(halved):
    place = jax.NamedSharding(jax.make_mesh((1,), ("batch",)), jax.P("batch"))
    x = jax.device_put(images(), place)
    assert res2net_jax.compile(model_of())(x).sharding.mesh == place.mesh
    assert not halved


def test_answers_are_where_the_images_are(halved):
    run, x = res2net_jax.compile(model_of(dtype=jnp.bfloat16)), images()
    device = jax.devices()[0]
    for given in x, jnp.asarray(x), jax.device_put(x, device):
        with jax.transfer_guard("disallow"):
            answers = run(given)
        assert answers.dtype == jnp.bfloat16 and answers.devices() == {device}
        assert answers.committed == getattr(given, "committed", False)
    assert len(halved) == 3


def test_a_subclass_that_looks_at_the_whole_batch(x64, halved):
    class Centred(res2net_jax.Res2Net):
        def __call__(self, x, key=None):
            logits = super().__call__(x, key)
            return logits - logits.mean(0), logits.mean()

    model, x = model_of(param_dtype="float64"), images(dtype="float64")
    logits = np.asarray(plain(model, x))
    model.__class__ = Centred
    centred, mean = res2net_jax.compile(model)(x)
    assert np.abs(centred - (logits - logits.mean(0))).max() < 1e-12 * np.abs(logits).max()
    assert abs(mean - logits.mean()) < 1e-12 and not halved


def test_on_more_cores_or_devices_all_is_whole(halved, monkeypatch):
    run = res2net_jax.compile(model_of())
    for change in (backend, "cores", lambda: 4), (backend, "cores", lambda: 1), (jax, "device_count", lambda: 8):
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            run(images())
    with jax.disable_jit():
        assert not per_core.Halves(run, []).take(images())
    assert not halved
    run(images())
    assert len(halved) == 1


def test_under_a_mesh_all_is_whole(halved):
    run, x = res2net_jax.compile(model_of()), images()
    with jax.set_mesh(jax.make_mesh((1,), ("batch",))):
        assert run(x).shape == (4, 1000)
    assert not halved


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_float64_stays_float64_where_it_is_switched_off(x64, halved):
    run, x = res2net_jax.compile(model_of(param_dtype="float64")), jnp.asarray(images(dtype="float64"))
    with jax.enable_x64(False):
        run(x)
    assert not halved
    assert run(x).dtype == jnp.float64 and len(halved) == 1


@pytest.mark.parametrize("name", ["NPROC", "PJRT_NPROC"])
def test_who_sets_the_number_of_threads_gets_it(name, halved, monkeypatch):
    monkeypatch.setenv(name, "1")
    res2net_jax.compile(model_of())(images())
    assert not halved


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_jaxlib_that_makes_no_such_clients(error, halved, monkeypatch):
    def make_cpu_client(**options):
        raise error

    monkeypatch.setattr(xla_client, "make_cpu_client", make_cpu_client)
    assert res2net_jax.compile(model_of())(images()).shape == (4, 1000)
    assert per_core.devices() == () and not halved


def test_threads_that_call_at_once_get_the_same_clients(halved, monkeypatch):
    make, made = xla_client.make_cpu_client, []

    def make_cpu_client(**options):
        made.append(options)
        time.sleep(0.1)
        return make(**options)

    monkeypatch.setattr(xla_client, "make_cpu_client", make_cpu_client)
    run, x, barrier = res2net_jax.compile(model_of()), images(), threading.Barrier(3)

    def call(_):
        barrier.wait()
        return run(x)

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(call, range(3)))
    assert all(np.array_equal(answer, run(x)) for answer in answers)
    assert len(halved) == 6 and len(made) == 2


def test_two_clients_whose_threads_may_use_both_cores():
    allowed = os.sched_getaffinity(0)
    devices = per_core.devices()
    assert len(devices) == 2 and len({device.client for device in devices} | {jax.devices()[0].client}) == 3
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended
            assert os.sched_getaffinity(int(thread)) >= allowed


def test_threads_of_others_keep_what_they_may_use(monkeypatch):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    started, seen = threading.Event(), []
    done = threading.Event()

    def pinned():
        os.sched_setaffinity(0, {second})
        started.set()
        done.wait(60)
        seen.append(os.sched_getaffinity(0))

    def make_cpu_client(**options):
        thread.start()
        started.wait(60)

    thread = threading.Thread(target=pinned)
    monkeypatch.setattr(xla_client, "make_cpu_client", make_cpu_client)
    per_core._client(first, {first, second})
    done.set()
    thread.join()
    assert seen == [{second}]


def test_weights_are_shared(monkeypatch):
    leaves = [jax.device_put(np.arange(64, dtype="float32"), jax.devices()[0])]
    seen = []
    run = backend.jit(lambda leaves, x: x)
    monkeypatch.setattr(run, "alone", lambda leaves, x: seen.append(leaves[0].unsafe_buffer_pointer()) or x)
    call = per_core.Halves(run, leaves)
    answers = call(images())
    np.testing.assert_array_equal(answers, images())
    assert answers.committed  # as the weights are
    assert seen == 2 * [leaves[0].unsafe_buffer_pointer()]
