"""Tasks: what is refused and how it is said, data sets in every layout, and the user's own files."""

import gzip
import hashlib
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assign.errors import TaskError
from assign.tasks import BUILTIN, Task, TaskOptions, load_task
from assign.tasks.data import Batches, random_crop, read_cifar, read_fashion_mnist

REAL_ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "cifar10-test.npz"
RNG = np.random.default_rng(0)


def mean_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def valid(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "model": nn.Linear(2, 1),
        "loss": mean_square,
        "train": [(torch.zeros(4, 2), torch.zeros(4, 1))],
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "epochs": 1,
    }
    return Task(**{**fields, **changes})


class TestTask:
    @pytest.mark.parametrize(
        ("field", "given", "said"),
        [
            ("model", 3, "model is 3; it must be a torch.nn.Module, or a function"),
            ("loss", "mse", "loss is 'mse'; it must be a function loss(model, batch)"),
            ("train", None, "train is None; it must be an iterable of batches"),
            ("train", torch.zeros(3), "train is a Tensor; it must be an iterable of batches"),
            ("train", iter([1]), "train is a list_iterator; it must be batches that can be read again"),
            ("optimizer", torch.optim.SGD(nn.Linear(1, 1).parameters()), "optimizer is a SGD; it must be a function"),
            ("optimizer", "adam", "optimizer is 'adam'; it must be a function optimizer(parameters)"),
            ("epochs", 0, "epochs is 0; it must be a whole number of at least 1"),
            ("epochs", True, "epochs is True; it must be a whole number"),
            ("evaluate", 0.5, "evaluate is 0.5; it must be a function evaluate(model) that returns named numbers"),
            ("scheduler", "cosine", "scheduler is 'cosine'; it must be a function scheduler(optimizer)"),
            ("name", 1, "name is 1; it must be a text"),
        ],
    )
    def test_says_which_field_is_wrong(self, field: str, given: Any, said: str) -> None:
        with pytest.raises(TaskError) as error:
            valid(**{field: given})
        assert said in str(error.value)

    def test_a_module_is_copied_for_each_run(self) -> None:
        model = nn.Linear(2, 1)
        made = valid(model=model).make_model()
        with torch.no_grad():
            made.weight.add_(1)
        assert not torch.equal(made.weight, model.weight)

    def test_a_function_makes_the_model_again(self) -> None:
        task = valid(model=lambda: nn.Linear(2, 1))
        torch.manual_seed(1)
        first = task.make_model()
        torch.manual_seed(1)
        assert torch.equal(first.weight, task.make_model().weight)

    def test_says_what_the_functions_made_instead(self) -> None:
        with pytest.raises(TaskError, match=r"model\(\) is a list; it must be a torch.nn.Module"):
            valid(model=list).make_model()
        with pytest.raises(TaskError, match=r"optimizer\(parameters\) is None; it must be a torch.optim.Optimizer"):
            valid(optimizer=lambda p: None).make_optimizer(nn.Linear(1, 1))
        with pytest.raises(TaskError, match="at least one parameter that requires a gradient"):
            valid().make_optimizer(nn.Linear(1, 1).requires_grad_(False))
        with pytest.raises(TaskError, match="at least one batch"):
            valid(train=[]).first_batch()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"batch_size": 0}, "batch_size is 0; give a whole number of at least 1"),
            ({"epochs": -1}, "epochs is -1"),
            ({"width": 0.0}, "width is 0.0; give a multiplier"),
            ({"device": "gpu"}, "device 'gpu' cannot be used here: choose from cpu"),
            ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here: choose from cpu"),
        ],
    )
    def test_options_are_checked(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(TaskError) as error:
            TaskOptions(**options)
        assert said in str(error.value)


class TestBatches:
    def make(self, n: int = 10, size: int = 3) -> Batches:
        return Batches(torch.arange(n), torch.arange(n), size=size, prepare=lambda x, _: x)

    def order(self, batches: Batches, seed: int | None = None) -> list[int]:
        if seed is not None:
            torch.manual_seed(seed)
        return [int(label) for _, labels in batches for label in labels]

    def test_full_batches_of_distinct_examples(self) -> None:
        batches = self.make()
        drawn = self.order(batches)
        assert len(batches) == 3
        assert [len(labels) for _, labels in batches] == [3, 3, 3]
        assert len(set(drawn)) == 9

    def test_the_global_seed_fixes_the_order(self) -> None:
        batches = self.make(100, 10)
        assert self.order(batches, seed=1) == self.order(batches, seed=1)
        assert self.order(batches) != self.order(batches)

    def test_inputs_and_labels_stay_together(self) -> None:
        assert all(torch.equal(inputs, labels) for inputs, labels in self.make())

    def test_refuses_a_batch_above_the_data(self) -> None:
        with pytest.raises(TaskError, match="batch_size is 11, but there are 10 training examples"):
            self.make(10, 11)

    @pytest.mark.parametrize("flip", [False, True])
    def test_crop_is_some_window_of_the_padded_image(self, flip: bool) -> None:
        images = torch.arange(1.0, 1 + 40 * 2 * 4 * 4).view(40, 2, 4, 4)
        moved = random_crop(images, torch.Generator().manual_seed(0), pad=1, flip=flip, fill=-1)
        padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
        seen = set()
        for before, after in zip(padded, moved, strict=True):
            windows = {
                (y, x, mirrored): before[:, y : y + 4, x : x + 4].flip(2)
                if mirrored
                else before[:, y : y + 4, x : x + 4]
                for y in range(3)
                for x in range(3)
                for mirrored in (False, True)
            }
            seen.update(place for place, window in windows.items() if torch.equal(window, after))
            assert any(torch.equal(window, after) for window in windows.values())
        assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == {0, 1, 2}
        assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def encode(images: np.ndarray) -> np.ndarray:
    """The archives' differences of images [n, 3, h, w]: the reverse of what the loader does, step by step."""
    planes = images.astype(np.int64).transpose(1, 0, 2, 3)
    red, green, blue = planes
    delta = np.stack([red - green, green, blue - green])
    for axis in (2, 3):
        delta = np.diff(delta, axis=axis, prepend=0)
    return (delta % 256).astype(np.uint8)


def photographs(n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), RNG.integers(0, classes, n, dtype=np.uint8)


def write_cifar_archives(directory: Path, classes: int, train: Any, test: Any) -> None:
    for part, (images, labels) in (("train", train), ("test", test)):
        np.savez(directory / f"cifar{classes}-{part}.npz", delta=encode(images), labels=labels)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as the byte strings of Python 2, in which the original files were made."""

    def save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def dump_like_python2(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def write_cifar_pickles(directory: Path, classes: int, train: Any, test: Any, dump: Any = pickle.dumps) -> None:
    folder = directory / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir()
    if classes == 10:
        parts = zip(np.array_split(train[0], 5), np.array_split(train[1], 5), strict=True)
        files = {f"data_batch_{n}": part for n, part in enumerate(parts, 1)} | {"test_batch": test}
    else:
        files = {"train": train, "test": test}
    for file, (images, labels) in files.items():
        content = {
            "data": images.reshape(len(images), -1),
            "labels" if classes == 10 else "fine_labels": labels.tolist(),
        }
        (folder / file).write_bytes(dump(content))


def write_idx(path: Path, array: np.ndarray, *, packed: bool) -> None:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    content = head + array.tobytes()
    name = path.with_name(path.name + ".gz") if packed else path
    name.write_bytes(gzip.compress(content) if packed else content)


def write_fashion(directory: Path, layout: str, arrays: dict[str, np.ndarray]) -> None:
    if layout == "npz":
        np.savez(directory / "fashion_mnist.npz", **arrays)
        return
    folder = directory / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, name in (("train", "train"), ("test", "t10k")):
        write_idx(folder / f"{name}-images-idx3-ubyte", arrays[f"{part}_images"], packed=layout == "gz")
        write_idx(folder / f"{name}-labels-idx1-ubyte", arrays[f"{part}_labels"], packed=layout == "gz")


def fashion_arrays(train: int = 12, test: int = 4) -> dict[str, np.ndarray]:
    sizes = {"train": train, "test": test}
    images = {f"{p}_images": RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for p, n in sizes.items()}
    return images | {f"{p}_labels": RNG.integers(0, 10, n, dtype=np.uint8) for p, n in sizes.items()}


class TestData:
    @pytest.mark.parametrize(
        "write", [write_cifar_archives, write_cifar_pickles, partial(write_cifar_pickles, dump=dump_like_python2)]
    )
    @pytest.mark.parametrize("classes", [10, 100])
    def test_cifar_in_both_layouts(self, tmp_path: Path, classes: int, write: Callable[..., None]) -> None:
        train, test = photographs(10, classes), photographs(4, classes)
        write(tmp_path, classes, train, test)
        data = read_cifar(tmp_path, classes)
        assert np.array_equal(data.train_images.numpy(), train[0])
        assert np.array_equal(data.train_labels.numpy(), train[1])
        assert np.array_equal(data.test_images.numpy(), test[0])
        assert np.array_equal(data.test_labels.numpy(), test[1])

    @pytest.mark.parametrize("layout", ["npz", "plain", "gz"])
    def test_fashion_mnist_in_every_layout(self, tmp_path: Path, layout: str) -> None:
        arrays = fashion_arrays()
        write_fashion(tmp_path, layout, arrays)
        data = read_fashion_mnist(tmp_path)
        assert data.train_images.shape == (12, 1, 28, 28)
        assert np.array_equal(data.train_images[:, 0].numpy(), arrays["train_images"])
        assert np.array_equal(data.test_labels.numpy(), arrays["test_labels"])

    @pytest.mark.skipif(not REAL_ARCHIVE.is_file(), reason=f"the published images are not there: {REAL_ARCHIVE}")
    def test_real_archive_decodes_to_the_published_bytes(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            (tmp_path / f"cifar10-{part}.npz").symlink_to(REAL_ARCHIVE)
        data = read_cifar(tmp_path, 10)
        pixels = data.test_images.permute(0, 2, 3, 1).contiguous().numpy()
        assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith("f9b1e2130bab680d")
        labels = data.test_labels.to(torch.uint8).numpy()
        assert hashlib.sha256(labels.tobytes()).hexdigest().startswith("cec8a24a1e92aa2e")

    def test_says_where_it_looked(self, tmp_path: Path) -> None:
        with pytest.raises(TaskError) as error:
            load_task("cifar10")
        assert str(error.value).startswith("task 'cifar10' needs its data: give the directory with --data.")
        assert "cifar10-train.npz and cifar10-test.npz, or cifar-10-batches-py/data_batch_1" in str(error.value)
        with pytest.raises(TaskError, match=r"task 'shakespeare': there is no directory .*nowhere"):
            load_task("shakespeare", TaskOptions(data=tmp_path / "nowhere"))
        (tmp_path / "cifar100-train.npz").touch()
        with pytest.raises(TaskError) as error:
            load_task("cifar100", TaskOptions(data=tmp_path))
        assert f"task 'cifar100': the data is not in {tmp_path}" in str(error.value)
        assert "Not found there: cifar100-test.npz, cifar-100-python/train, cifar-100-python/test" in str(error.value)

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            (tmp_path / f"cifar10-{part}.npz").write_bytes(b"PK\3\4 cut off")
        with pytest.raises(TaskError, match=r"cifar10-train.npz cannot be read: .* with delta, labels; copy it again"):
            read_cifar(tmp_path, 10)
        write_fashion(tmp_path, "plain", fashion_arrays())
        labels = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:-1])
        with pytest.raises(TaskError, match=r"train-labels-idx1-ubyte cannot be read: .* IDX file of Fashion-MNIST"):
            read_fashion_mnist(tmp_path)

    def test_a_pickle_runs_no_code(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "ran",)

        folder = tmp_path / "cifar-100-python"
        folder.mkdir()
        for part in ("train", "test"):
            (folder / part).write_bytes(pickle.dumps({"data": Evil(), "fine_labels": []}))
        with pytest.raises(TaskError, match=r"train cannot be read: it holds .*, which is not an array"):
            read_cifar(tmp_path, 100)
        assert not (tmp_path / "ran").exists()

    def test_a_pickle_cannot_crash_the_interpreter(self, tmp_path: Path) -> None:
        """A dtype that says of its bytes that they are objects makes NumPy follow them as pointers."""

        class Pointers:
            def __reduce__(self) -> Any:
                return np.dtype, ("u1", False, True), (3, "|", None, None, None, -1, -1, 63)

        class Crafted:
            def __reduce__(self) -> Any:
                state = (1, (1,), Pointers(), False, b"A" * 8)
                return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

        array = pickle.dumps(np.zeros(1, dtype=np.uint8), protocol=2)
        deep = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."
        bad_dtype = pickle.dumps({"data": Crafted(), "fine_labels": []}, protocol=2)
        script = (
            "from pathlib import Path; import sys; from assign.tasks.data import read_cifar; "
            "from assign.errors import TaskError\n"
            "for each in sys.argv[1:]:\n"
            "    try: read_cifar(Path(each), 100)\n"
            "    except TaskError as error: print('refused', error)"
        )
        wanted = {"a dtype that is not plain": bad_dtype, "a key that is not a string": deep, "not a dictionary": array}
        for number, content in enumerate(wanted.values()):
            folder = tmp_path / str(number) / "cifar-100-python"
            folder.mkdir(parents=True)
            for part in ("train", "test"):
                (folder / part).write_bytes(content)
        places = [str(tmp_path / str(number)) for number in range(len(wanted))]
        found = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        for fact, line in zip(wanted, found.stdout.splitlines(), strict=True):
            assert fact in line

    def test_sizes_that_lie_take_no_memory(self, tmp_path: Path) -> None:
        header = io.BytesIO()
        shape = (3, 99999, 32, 32)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for part in ("train", "test"):
            with zipfile.ZipFile(tmp_path / f"cifar10-{part}.npz", "w") as archive:
                archive.writestr("delta.npy", header.getvalue())
                archive.writestr("labels.npy", header.getvalue())
        with pytest.raises(TaskError, match=r"delta.npy has 0 bytes, and its header says 307,196,928"):
            read_cifar(tmp_path, 10)
        write_fashion(tmp_path, "gz", fashion_arrays())
        images = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
        images.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"\0" * 100))
        with pytest.raises(TaskError, match=r"its sizes \[4294967295, .* do not fit its 116 bytes"):
            read_fashion_mnist(tmp_path)
        images.write_bytes(gzip.compress(b"\0" * (2**28 + 1)))
        with pytest.raises(TaskError, match="more than the 268,435,456 bytes"):
            read_fashion_mnist(tmp_path)

    def test_every_image_has_a_label_of_its_own(self, tmp_path: Path) -> None:
        arrays = fashion_arrays()
        write_fashion(tmp_path, "npz", {**arrays, "train_labels": arrays["train_labels"][1:]})
        with pytest.raises(TaskError, match="12 training images and 11 labels"):
            read_fashion_mnist(tmp_path)
        write_fashion(tmp_path, "npz", {**arrays, "test_labels": np.full(4, 10, dtype=np.uint8)})
        with pytest.raises(TaskError, match=r"test labels go from 10 to 10\. Allowed: 0 to 9"):
            read_fashion_mnist(tmp_path)


def write_all_data(directory: Path) -> None:
    for classes in (10, 100):
        write_cifar_archives(directory, classes, photographs(8, classes), photographs(4, classes))
    write_fashion(directory, "npz", fashion_arrays())
    (directory / "tinyshakespeare.txt").write_text("To be, or not to be: that is the question.\n" * 100)


class TestBuiltin:
    @pytest.mark.parametrize("name", BUILTIN)
    def test_makes_a_loss_and_judges(self, tmp_path: Path, name: str) -> None:
        write_all_data(tmp_path)
        data = None if name == "digits" else tmp_path
        task = load_task(name, TaskOptions(data=data, batch_size=4, width=0.25, epochs=3))
        assert (task.name, task.epochs) == (name, 3)
        model = task.make_model()
        batch = task.first_batch()
        assert len(batch[0]) == 4
        assert batch[0].is_contiguous()
        loss = task.loss(model, batch)
        loss.backward()
        task.make_optimizer(model).step()
        assert torch.isfinite(loss)
        assert task.evaluate is not None
        model.eval()
        with torch.no_grad():
            metrics = task.evaluate(model)
        assert metrics is not None
        assert set(metrics) == ({"val_loss", "accuracy"} if name == "shakespeare" else {"accuracy"})
        assert 0 <= metrics["accuracy"] <= 1

    def test_pixels_are_normalised_by_channel(self, tmp_path: Path) -> None:
        white = np.full((4, 3, 32, 32), 255, dtype=np.uint8), np.zeros(4, dtype=np.uint8)
        write_cifar_archives(tmp_path, 10, white, white)
        task = load_task("cifar10", TaskOptions(data=tmp_path, batch_size=4))
        seen = []
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.register_forward_hook(lambda _, inputs, output: seen.append(output))
        assert task.evaluate is not None
        task.evaluate(model)
        expected = [(1 - 0.4914) / 0.2023, (1 - 0.4822) / 0.1994, (1 - 0.4465) / 0.2010]
        assert torch.allclose(seen[0], torch.tensor(expected))

    def test_resnet18_has_the_papers_parameters(self, tmp_path: Path) -> None:
        write_all_data(tmp_path)
        model = load_task("cifar10", TaskOptions(data=tmp_path, batch_size=4)).make_model()
        assert sum(p.numel() for p in model.parameters()) == 11_173_962  # arXiv 2301.13464's code counts the same

    def test_gpt_looks_only_back_and_ties_its_weights(self, tmp_path: Path) -> None:
        write_all_data(tmp_path)
        task = load_task("shakespeare", TaskOptions(data=tmp_path, batch_size=4))
        model = task.make_model().eval()
        inputs = task.first_batch()[0]
        changed = inputs.clone()
        changed[:, 64:] = (changed[:, 64:] + 1) % 5
        with torch.no_grad():
            assert torch.allclose(model(inputs)[:, :64], model(changed)[:, :64], atol=1e-5)
            assert not torch.allclose(model(inputs)[:, 64:], model(changed)[:, 64:], atol=1e-5)
        assert model.head.weight is model.embedding.weight

    def test_digits_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(
            TaskError, match=r"scikit-learn is not installed. Run: pip install 'precision-assign\[demo\]'"
        ):
            load_task("digits")

    def test_digits_reads_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(TaskError, match="task 'digits' comes with scikit-learn and reads no directory"):
            load_task("digits", TaskOptions(data=tmp_path))


USER_FILE = """
import torch
from torch import nn
from assign.tasks import Task
import beside

seen = {}

def make(**options):
    seen.update(options)
    return Task(model=nn.Linear(2, 1), loss=lambda m, b: m(b).mean(), train=[torch.zeros(3, 2)],
                optimizer=lambda p: torch.optim.SGD(p, lr=beside.RATE), epochs=2)

def task(batch_size=7, seed=0):
    return make(batch_size=batch_size, seed=seed)

def plain(): return make()
def keywords(**options): return make(**options)
def needs(data): return make(data=data)
def strange(colour): return make()
def broken(): raise ValueError("no such luck")
def leaves(): raise SystemExit(2)
def wrong(): return {"model": 1}
def invalid(): return Task(model=3, loss=None, train=[], optimizer=None, epochs=1)
number = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "beside.py").write_text("RATE = 0.5\n")
    (tmp_path / "my_train.py").write_text(USER_FILE)
    yield tmp_path / "my_train.py"
    for name in ("beside", "my_train", "assign_task_my_train"):
        sys.modules.pop(name, None)


class TestLoadTask:
    def test_a_file_with_its_neighbours(self, user_file: Path) -> None:
        task = load_task(f"{user_file}:plain")
        assert task.name == f"{user_file}:plain"
        assert task.epochs == 2
        assert task.make_optimizer(task.make_model()).param_groups[0]["lr"] == 0.5
        assert str(user_file.parent) not in sys.path

    def test_function_task_is_the_default(self, user_file: Path) -> None:
        load_task(str(user_file), TaskOptions(seed=5))
        assert sys.modules["assign_task_my_train"].seen == {"batch_size": 7, "seed": 5}

    def test_options_reach_the_parameters_of_their_name(self, user_file: Path) -> None:
        load_task(f"{user_file}:task", TaskOptions(seed=3, batch_size=9))
        assert sys.modules["assign_task_my_train"].seen == {"batch_size": 9, "seed": 3}
        load_task(f"{user_file}:keywords", TaskOptions(data=user_file.parent))
        assert sys.modules["assign_task_my_train"].seen == {"data": user_file.parent, "seed": 0, "device": "cpu"}

    def test_epochs_need_no_parameter(self, user_file: Path) -> None:
        assert load_task(f"{user_file}:plain", TaskOptions(epochs=9)).epochs == 9

    def test_a_module(self, user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(user_file.parent)
        assert load_task("my_train:plain").epochs == 2

    def test_the_seed_fixes_the_users_model(self, user_file: Path) -> None:
        weights = [load_task(f"{user_file}:plain", TaskOptions(seed=s)).make_model().weight for s in (1, 1, 2)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    @pytest.mark.parametrize(
        ("function", "options", "said"),
        [
            ("tusk", {}, "has no function 'tusk', did you mean 'task'"),
            ("xyz", {}, "has no function 'xyz'. Its functions: make, task, plain, keywords"),
            (
                "number",
                {},
                "my_train.py:number is not a function but a int. It must return an assign.Task:\n  def task()",
            ),
            ("wrong", {}, "my_train.py:wrong returned a dict. It must return an assign.Task:\n  def task() ->"),
            ("broken", {}, "my_train.py:broken raised ValueError: no such luck\n  at: "),
            ("leaves", {}, "my_train.py:leaves raised SystemExit: 2"),
            ("invalid", {}, "Task: model is 3; it must be a torch.nn.Module"),
            (
                "strange",
                {},
                "my_train.py:strange needs colour, which assign does not pass. A task's function may take data, ",
            ),
            ("needs", {}, "my_train.py:needs needs data: give --data, or give the parameter a default."),
            ("plain", {"batch_size": 4}, "my_train.py:plain takes no batch_size, but batch_size=4 was given."),
        ],
    )
    def test_says_what_is_wrong(self, user_file: Path, function: str, options: dict[str, Any], said: str) -> None:
        with pytest.raises(TaskError) as error:
            load_task(f"{user_file}:{function}", TaskOptions(**options))
        assert said in str(error.value)

    def test_keeps_the_cause_and_the_users_line(self, user_file: Path) -> None:
        with pytest.raises(TaskError) as error:
            load_task(f"{user_file}:broken")
        assert isinstance(error.value.__cause__, ValueError)
        assert 'def broken(): raise ValueError("no such luck")' in str(error.value)
        with pytest.raises(TaskError) as error:
            load_task(f"{user_file}:invalid")
        assert error.value.__notes__ == [f"raised by {user_file}:invalid"]

    def test_files_that_are_not_there(self, user_file: Path) -> None:
        with pytest.raises(TaskError) as error:
            load_task(f"{user_file.with_name('my_trian.py')}:task")
        assert "there is no task file" in str(error.value)
        assert "nearest: 'my_train.py'" in str(error.value)
        with pytest.raises(TaskError, match=r"there is no task file nowhere/at/all.py. Give path/to/file.py:function"):
            load_task("nowhere/at/all.py:task")

    def test_files_that_do_not_load(self, tmp_path: Path) -> None:
        (tmp_path / "bad.py").write_text("def task(:\n")
        with pytest.raises(TaskError, match=r"importing .*bad.py raised SyntaxError"):
            load_task(f"{tmp_path / 'bad.py'}:task")
        (tmp_path / "needy.py").write_text("import a_module_that_is_not_there\n")
        with pytest.raises(TaskError, match=r"importing .*needy.py raised ModuleNotFoundError: No module named 'a_mod"):
            load_task(f"{tmp_path / 'needy.py'}:task")

    def test_a_file_without_a_function(self, tmp_path: Path) -> None:
        (tmp_path / "other.py").write_text("def build(): pass\n")
        with pytest.raises(
            TaskError, match=r"name the function that makes the task, .*other.py:build. Without a name, 'task'"
        ):
            load_task(str(tmp_path / "other.py"))

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("digit", "there is no task 'digit', did you mean 'digits'"),
            ("xyzzy", "there is no task 'xyzzy'. Built-in: digits, cifar10, cifar100, fashion-mnist, shakespeare."),
            ("", "there is no task ''. Built-in: digits"),
            ("no_such_package.inner:task", "there is no module 'no_such_package' to import the task"),
            ("json:loadz", "json has no function 'loadz', did you mean 'load', 'loads'"),
        ],
    )
    def test_names_that_are_not_there(self, spec: str, said: str) -> None:
        with pytest.raises(TaskError) as error:
            load_task(spec)
        assert said in str(error.value)
