"""Graded questions of exercise 04: nine mends of a published-style script, and one judgement.

Every question takes one mistake out of the script and makes it a small function. The models that
the answers are tried on are built here, inside ``apply``, from plain arrays; like the models of
the transformers library they take ``labels`` and return an object with ``loss`` and ``logits``.
Each ``wrong`` table starts with the mistake as it stands in the script.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tlcourse.checks import Question

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # the defaults of Adam and AdamW


# --- shared small pieces -------------------------------------------------------------------------


def plain(value):
    """Tensors and arrays, also inside lists and tuples, as plain lists of numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def tensor(value, what: str):
    """The value if it is a torch tensor.

    Raises:
        TypeError: if it is anything else.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{what}: expected a torch tensor, got {type(value).__name__}")
    return value


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; logits (N, K)."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def wrap(network):
    """Give a torch module the calling convention of the transformers library."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixel_values, labels=None):
            logits = self.network(pixel_values)
            loss = None
            if labels is not None:
                loss = torch.nn.functional.cross_entropy(logits, labels)
            return SimpleNamespace(loss=loss, logits=logits)

    return Wrapped()


def linear(weight: np.ndarray, bias: np.ndarray):
    """torch.nn.Linear in float64 with the given weight (K, D) and bias (K,)."""
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


def uneven(rng: np.random.Generator, batches: int) -> list[int]:
    """Batch sizes of one pass: equal ones, and a last batch of one example."""
    return [int(rng.integers(3, 7))] * (batches - 1) + [1]


# --- q1: the optimizer ---------------------------------------------------------------------------


def cases_optimizer(rng):
    cases = []
    for lr, weight_decay, steps in [(0.1, 0.5, 1), (0.01, 0.0, 3), (0.05, 2.0, 4)]:
        weight, bias = rng.normal(size=(2, 2)), rng.normal(size=2)
        gradients = [(rng.normal(size=(2, 2)), rng.normal(size=2)) for _ in range(steps)]
        cases.append((weight, bias, gradients, lr, weight_decay))
    return cases


def apply_optimizer(answer, weight, bias, gradients, lr, weight_decay):
    import torch

    layer = linear(weight, bias)
    optimizer = answer(layer, lr, weight_decay)
    for weight_gradient, bias_gradient in gradients:
        layer.weight.grad = torch.from_numpy(np.array(weight_gradient))
        layer.bias.grad = torch.from_numpy(np.array(bias_gradient))
        optimizer.step()
    return {
        "weight after the steps": layer.weight.detach().numpy().copy(),
        "bias after the steps": layer.bias.detach().numpy().copy(),
    }


def adamw(theta, gradients, lr, weight_decay):
    """AdamW written out. Loshchilov and Hutter 2019, algorithm 2, arXiv:1711.05101."""
    theta = np.array(theta, dtype=float)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for step, gradient in enumerate(gradients, start=1):
        theta *= 1 - lr * weight_decay
        first = BETA_1 * first + (1 - BETA_1) * gradient
        second = BETA_2 * second + (1 - BETA_2) * gradient**2
        theta -= (lr * first / (1 - BETA_1**step)) / (
            np.sqrt(second / (1 - BETA_2**step)) + EPSILON
        )
    return theta


def reference_optimizer(weight, bias, gradients, lr, weight_decay):
    return {
        "weight after the steps": adamw(weight, [g[0] for g in gradients], lr, weight_decay),
        "bias after the steps": adamw(bias, [g[1] for g in gradients], lr, weight_decay),
    }


def right_optimizer(model, lr, weight_decay):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)


def optimizer_from_transformers(model, lr, weight_decay):
    from transformers import AdamW  # type: ignore[attr-defined]  # removed in version 5

    return AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)


def optimizer_coupled(model, lr, weight_decay):
    import torch

    return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)


def optimizer_default_decay(model, lr, weight_decay):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=lr)


def optimizer_without_bias(model, lr, weight_decay):
    import torch

    return torch.optim.AdamW([model.weight], lr=lr, weight_decay=weight_decay)


def optimizer_sgd(model, lr, weight_decay):
    import torch

    return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)


# --- q2: the input -------------------------------------------------------------------------------


def cases_images(rng):
    shapes = [(1, 2, 2, 3), (1, 3, 5, 3), (3, 4, 4, 3)]
    cases = [(rng.integers(0, 256, size=shape).astype(np.uint8),) for shape in shapes]
    extremes = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    extremes[:, 0] = 255
    return [*cases, (extremes,)]


def apply_images(answer, images):
    inputs = tensor(answer(images), "the images")
    return {
        "shape": str(tuple(inputs.shape)),
        "dtype": str(inputs.dtype),
        "values": inputs.detach().numpy().astype(float),
    }


def reference_images(images):
    values = images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    return {
        "shape": str(values.shape),
        "dtype": "torch.float32",
        "values": values.astype(float),
    }


def hint_images(case, expected, got):
    """What to look at first: axes, type, or range."""
    if got["shape"] != expected["shape"]:
        return "The channels come second: (N, 3, H, W). permute moves axes."
    if got["dtype"] != expected["dtype"]:
        return "Networks are trained in float32: .float() before the arithmetic."
    return "0 becomes -1 and 255 becomes 1. Make floats first; move axes, do not reshape."


def right_images(images):
    import torch

    return torch.from_numpy(images).float().permute(0, 3, 1, 2) / 127.5 - 1


def images_as_text(images):
    import torch

    return torch.tensor([[ord(letter) for letter in str(image)[:16]] for image in images])


def images_reshaped(images):
    import torch

    count, height, width, channels = images.shape
    values = torch.tensor(images, dtype=torch.float32).reshape(count, channels, height, width)
    return values / 127.5 - 1


def images_in_unit_range(images):
    import torch

    return torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2) / 255


def images_overflow(images):
    import torch

    return torch.tensor(images * np.uint8(2) / 255 - 1, dtype=torch.float32).permute(0, 3, 1, 2)


def images_channels_last(images):
    import torch

    return torch.tensor(images, dtype=torch.float32) / 127.5 - 1


def images_double_precision(images):
    import torch

    return torch.tensor(images / 127.5 - 1).permute(0, 3, 1, 2)


# --- q3: what the test is read on ----------------------------------------------------------------


def cases_split(rng):
    return [
        (int(rng.integers(8, 20)) * 8, fraction, int(rng.integers(1000)))
        for fraction in (0.25, 0.5, 0.125)
    ]


def apply_split(answer, num_examples, test_fraction, seed):
    """The two parts for a seed, for the same again, and for another."""
    splits = [answer(num_examples, test_fraction, s) for s in (seed, seed, seed + 1)]
    return [[[int(i) for i in plain(part)] for part in (train, test)] for train, test in splits]


def measure_split(splits, num_examples, test_fraction, seed):
    (train, test), (_, again), (_, other) = splits
    return {
        "number of training examples": len(train),
        "number of test examples": len(test),
        "examples that are in both": len(set(train) & set(test)),
        "different examples in all": len({i for i in train + test if 0 <= i < num_examples}),
        "same seed gives the same split": sorted(again) == sorted(test),
        "another seed gives another split": sorted(other) != sorted(test),
    }


def reference_split(num_examples, test_fraction, seed):
    num_test = round(test_fraction * num_examples)
    return {
        "number of training examples": num_examples - num_test,
        "number of test examples": num_test,
        "examples that are in both": 0,
        "different examples in all": num_examples,
        "same seed gives the same split": True,
        "another seed gives another split": True,
    }


def hint_split(case, expected, got):
    """What to look at first: a leak, the sizes, or the seed."""
    if got["examples that are in both"]:
        return "An example on both sides is a leak. Draw one permutation and cut it once."
    if got["number of test examples"] != expected["number of test examples"]:
        return "test_fraction is the share of the test set; the rest is for training."
    if got["different examples in all"] != expected["different examples in all"]:
        return "Some example is in neither part."
    return "The order must come from a generator that is seeded with seed."


def right_split(num_examples, test_fraction, seed):
    order = np.random.default_rng(seed).permutation(num_examples)
    num_test = round(test_fraction * num_examples)
    return order[num_test:], order[:num_test]


def split_none(num_examples, test_fraction, seed):
    everything = list(range(num_examples))
    return everything, everything


def split_last_block(num_examples, test_fraction, seed):
    num_test = round(test_fraction * num_examples)
    indices = np.arange(num_examples)
    return indices[:-num_test], indices[-num_test:]


def split_independent(num_examples, test_fraction, seed):
    rng = np.random.default_rng(seed)
    num_test = round(test_fraction * num_examples)
    train = rng.permutation(num_examples)[num_test:]
    return train, rng.permutation(num_examples)[:num_test]


def split_with_replacement(num_examples, test_fraction, seed):
    rng = np.random.default_rng(seed)
    test = rng.integers(0, num_examples, size=round(test_fraction * num_examples))
    return np.setdiff1d(np.arange(num_examples), test), test


def split_swapped(num_examples, test_fraction, seed):
    order = np.random.default_rng(seed).permutation(num_examples)
    num_test = round(test_fraction * num_examples)
    return order[:num_test], order[num_test:]


# --- q4: batches ---------------------------------------------------------------------------------


def cases_batches(rng):
    cases = []
    for count, batch_size in [(30, 8), (25, 10), (12, 4)]:
        images = rng.normal(size=(count, 3, 2, 2)).astype(np.float32)
        cases.append((images, rng.integers(0, 10, size=count), batch_size))
    return cases


def apply_batches(answer, images, labels, batch_size):
    """Two passes over the answer's batches, each a list of [images, labels]."""
    import torch

    batches = answer(torch.from_numpy(images), torch.from_numpy(labels), batch_size)
    return [[[tensor(x, "the images"), plain(y)] for x, y in batches] for _ in range(2)]


def measure_batches(passes, images, labels, batch_size):
    first, second = (one_pass(batches, images, labels) for batches in passes)
    sizes, order, paired = first
    sizes_again, order_again, paired_again = second
    return {
        "batch sizes": sizes,
        "every example once": sorted(order) == list(range(len(images))),
        "images keep their labels": paired and paired_again,
        "shuffled": order != sorted(order),
        "batch sizes of the second pass": sizes_again,
        "second pass in a new order": order_again != order,
    }


def one_pass(batches, images, labels) -> tuple[list[int], list[int], bool]:
    """Sizes of the batches, places of their images in ``images``, and whether labels match."""
    place = {image.tobytes(): index for index, image in enumerate(images)}
    sizes, order, paired = [], [], True
    for batch_images, batch_labels in batches:
        sizes.append(len(batch_images))
        for image, label in zip(batch_images, batch_labels, strict=True):
            index = place[np.ascontiguousarray(image).tobytes()]
            order.append(index)
            paired = paired and int(label) == int(labels[index])
    return sizes, order, paired


def reference_batches(images, labels, batch_size):
    full, rest = divmod(len(images), batch_size)
    sizes = [batch_size] * full + ([rest] if rest else [])
    return {
        "batch sizes": sizes,
        "every example once": True,
        "images keep their labels": True,
        "shuffled": True,
        "batch sizes of the second pass": sizes,
        "second pass in a new order": True,
    }


def hint_batches(case, expected, got):
    """What to look at first: sizes, labels, order, or the second pass."""
    if got["batch sizes"] != expected["batch sizes"]:
        return "batch_size examples in each batch; the last one takes what is left."
    if not got["images keep their labels"]:
        return "Shuffle images and labels with the same permutation."
    if got["batch sizes of the second pass"] != expected["batch sizes"]:
        return "The second epoch found nothing left. Return something that can start again."
    return "Every pass draws a new order. A DataLoader with shuffle=True does."


def right_batches(images, labels, batch_size):
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)


def batches_whole_set(images, labels, batch_size):
    return [(images, labels)]


def batches_in_order(images, labels, batch_size):
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def batches_drop_last(images, labels, batch_size):
    from torch.utils.data import DataLoader, TensorDataset

    dataset = TensorDataset(images, labels)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)


def batches_unpaired(images, labels, batch_size):
    import torch

    images = images[torch.randperm(len(images))]
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def batches_shuffled_once(images, labels, batch_size):
    import torch

    order = torch.randperm(len(images))
    pairs = zip(images[order].split(batch_size), labels[order].split(batch_size), strict=True)
    return list(pairs)


def batches_one_pass_only(images, labels, batch_size):
    return iter(batches_shuffled_once(images, labels, batch_size))


# --- q5: the loss --------------------------------------------------------------------------------


def cases_loss(rng):
    cases = []
    for count, features, classes in [(3, 2, 2), (8, 3, 10), (1, 6, 2)]:
        weight, bias = rng.normal(size=(classes, features)), rng.normal(size=classes)
        images = rng.normal(size=(count, features))
        cases.append((weight, bias, images, rng.integers(0, classes, size=count)))
    return cases


def apply_loss(answer, weight, bias, images, labels):
    import torch

    layer = linear(weight, bias)
    loss = answer(wrap(layer), torch.from_numpy(images), torch.from_numpy(labels))
    loss = tensor(loss, "the loss")
    loss.backward()
    gradient = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
    return {"loss": loss.item(), "gradient of the weight": gradient.numpy().copy()}


def reference_loss(weight, bias, images, labels):
    probabilities = softmax(images @ weight.T + bias)
    rows = np.arange(len(labels))
    loss = -np.log(probabilities[rows, labels]).mean()
    probabilities[rows, labels] -= 1  # lesson 03: dL/dz = p - y
    return {"loss": float(loss), "gradient of the weight": probabilities.T @ images / len(labels)}


def right_loss(model, images, labels):
    return model(images, labels=labels).loss


def loss_without_labels(model, images, labels):
    return model(images).loss


def loss_detached(model, images, labels):
    import torch

    return torch.tensor(model(images, labels=labels).loss.item(), requires_grad=True)


def loss_softmax_twice(model, images, labels):
    import torch

    probabilities = model(images).logits.softmax(dim=-1)
    return torch.nn.functional.cross_entropy(probabilities, labels)


def loss_summed(model, images, labels):
    import torch

    return torch.nn.functional.cross_entropy(model(images).logits, labels, reduction="sum")


def loss_of_own_predictions(model, images, labels):
    return model(images, labels=model(images).logits.argmax(dim=-1)).loss


# --- q6: the device ------------------------------------------------------------------------------


def cases_device(rng):
    return [
        (rng.normal(size=(2, 3)), rng.integers(0, 3, size=2), "cpu"),
        (rng.normal(size=(4, 5)), rng.integers(0, 3, size=4), "meta"),
    ]


def apply_device(answer, images, labels, device):
    import torch

    model = torch.nn.Linear(images.shape[1], 3, device=device, dtype=torch.float64)
    moved_images, moved_labels = answer(model, torch.from_numpy(images), torch.from_numpy(labels))
    return {
        "device of the images": str(moved_images.device),
        "device of the labels": str(moved_labels.device),
        "device of the model": str(model.weight.device),
        "shape of the images": list(moved_images.shape),
        "shape of the labels": list(moved_labels.shape),
        # The meta device has shapes and no values.
        "labels": None if device == "meta" else plain(moved_labels),
    }


def reference_device(images, labels, device):
    return {
        "device of the images": device,
        "device of the labels": device,
        "device of the model": device,
        "shape of the images": list(images.shape),
        "shape of the labels": list(labels.shape),
        "labels": None if device == "meta" else labels.tolist(),
    }


def right_device(model, images, labels):
    device = next(model.parameters()).device
    return images.to(device), labels.to(device)


def device_undefined(model, images, labels):
    return images.to(device), labels.to(device)  # type: ignore[name-defined]  # noqa: F821


def device_guessed(model, images, labels):
    import torch

    guess = "cuda" if torch.cuda.is_available() else "cpu"
    return images.to(guess), labels.to(guess)


def device_images_only(model, images, labels):
    return images.to(next(model.parameters()).device), labels


def device_moves_the_model(model, images, labels):
    model.to_empty(device="cpu")
    return images, labels


# --- q7: collecting the labels -------------------------------------------------------------------


def cases_labels(rng):
    return [
        ([rng.integers(0, 10, size=size) for size in uneven(rng, batches)],)
        for batches in (3, 2, 4)
    ]


def apply_labels(answer, batches):
    import torch

    loader = [(torch.zeros(len(labels), 1), torch.from_numpy(labels)) for labels in batches]
    return plain(answer(loader))


def reference_labels(batches):
    return np.concatenate(batches).tolist()


def right_labels(loader):
    return [label for _images, labels in loader for label in labels.tolist()]


def labels_shadowed(loader):
    labels = []
    for _images, labels in loader:
        labels.extend(labels.tolist())
    return labels


def labels_last_batch(loader):
    return [labels.tolist() for _images, labels in loader][-1]


def labels_nested(loader):
    return [labels.tolist() for _images, labels in loader]


def labels_first_of_each_batch(loader):
    return [int(labels[0]) for _images, labels in loader]


# --- q8: the accuracy ----------------------------------------------------------------------------


def cases_accuracy(rng):
    cases = []
    for batches in (3, 2, 4):
        logits = [rng.normal(size=(size, 5)) for size in uneven(rng, batches)]
        targets = np.concatenate([batch.argmax(axis=1) for batch in logits])
        # The short last batch is all wrong, the first batch has one error: the mean over batches
        # is then not the mean over examples.
        targets[-1] = (targets[-1] + 1) % 5
        targets[0] = (targets[0] + 1) % 5
        cases.append((logits, targets.tolist()))
    return cases


def apply_accuracy(answer, logits, targets):
    import torch

    return float(answer([torch.from_numpy(batch) for batch in logits], list(targets)))


def reference_accuracy(logits, targets):
    predictions = np.concatenate(logits).argmax(axis=1)
    return float((predictions == np.array(targets)).mean())


def right_accuracy(batches_of_logits, targets):
    predictions = [p for logits in batches_of_logits for p in logits.argmax(dim=-1).tolist()]
    return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)


def accuracy_nested(batches_of_logits, targets):
    predictions = []
    for logits in batches_of_logits:
        predictions.append(logits.argmax(dim=-1).tolist())
    return sum(p == t for p, t in zip(predictions, targets, strict=False)) / len(targets)


def accuracy_mean_over_batches(batches_of_logits, targets):
    scores, start = [], 0
    for logits in batches_of_logits:
        right = logits.argmax(dim=-1).tolist()
        truth = targets[start : start + len(right)]
        scores.append(np.mean([p == t for p, t in zip(right, truth, strict=True)]))
        start += len(right)
    return float(np.mean(scores))


def accuracy_wrong_axis(batches_of_logits, targets):
    predictions = [p for logits in batches_of_logits for p in logits.argmax(dim=0).tolist()]
    return sum(p == t for p, t in zip(predictions, targets, strict=False)) / len(targets)


def accuracy_as_count(batches_of_logits, targets):
    predictions = [p for logits in batches_of_logits for p in logits.argmax(dim=-1).tolist()]
    return float(sum(p == t for p, t in zip(predictions, targets, strict=True)))


def accuracy_of_last_batch(batches_of_logits, targets):
    predictions = batches_of_logits[-1].argmax(dim=-1).tolist()
    return float(np.mean([p == t for p, t in zip(predictions, targets[-1:], strict=True)]))


# --- q9: testing without touching the model ------------------------------------------------------


def cases_logits(rng):
    cases = []
    for training, features in [(True, 2), (False, 3), (True, 5)]:
        mean, variance = rng.normal(size=features), rng.uniform(0.5, 2.0, size=features)
        weight, bias = rng.normal(size=(4, features)), rng.normal(size=4)
        batches = [rng.normal(loc=1.0, size=(size, features)) for size in (3, 3, 2)]
        cases.append((mean, variance, weight, bias, batches, training))
    return cases


def apply_logits(answer, mean, variance, weight, bias, batches, training):
    import torch

    norm = torch.nn.BatchNorm1d(len(mean), dtype=torch.float64)
    norm.running_mean.copy_(torch.from_numpy(mean))
    norm.running_var.copy_(torch.from_numpy(variance))
    model = wrap(torch.nn.Sequential(norm, torch.nn.Dropout(0.5), linear(weight, bias)))
    model.train(training)
    loader = [(torch.from_numpy(b), torch.zeros(len(b), dtype=torch.long)) for b in batches]
    logits = tensor(answer(model, loader), "the logits")
    return {
        "shape": str(tuple(logits.shape)),
        "logits": logits.detach().numpy().astype(float),
        "running mean of the BatchNorm afterwards": norm.running_mean.numpy().copy(),
        "model.training afterwards": model.training,
        "logits carry a graph": bool(logits.requires_grad),
    }


def reference_logits(mean, variance, weight, bias, batches, training):
    inputs = np.concatenate(batches)
    logits = (inputs - mean) / np.sqrt(variance + 1e-5) @ weight.T + bias
    return {
        "shape": str(logits.shape),
        "logits": logits,
        "running mean of the BatchNorm afterwards": mean,
        "model.training afterwards": training,
        "logits carry a graph": False,
    }


def hint_logits(case, expected, got):
    """What to look at first: all batches, the mode, the mode afterwards, or the graph."""
    if got["shape"] != expected["shape"]:
        return "One row for every example of every batch: torch.cat."
    mean = "running mean of the BatchNorm afterwards"
    if not np.allclose(got[mean], expected[mean]):
        return "The running mean has moved, so the BatchNorm was in training mode."
    if not np.allclose(got["logits"], expected["logits"]):
        return "Is the Dropout off? One call on the model does it."
    if got["model.training afterwards"] != expected["model.training afterwards"]:
        return "Remember model.training before you change it, and put it back."
    return "No gradient is needed here: torch.no_grad()."


def right_logits(model, loader):
    was_training = model.training
    logits = logits_mode_not_restored(model, loader)
    model.train(was_training)
    return logits


def logits_in_training_mode(model, loader):
    import torch

    with torch.no_grad():
        return torch.cat([model(images).logits for images, _labels in loader])


def logits_mode_not_restored(model, loader):
    model.eval()
    return logits_in_training_mode(model, loader)


def logits_always_back_to_training(model, loader):
    model.eval()
    logits = logits_in_training_mode(model, loader)
    model.train()
    return logits


def logits_with_graph(model, loader):
    import torch

    was_training = model.training
    model.eval()
    logits = torch.cat([model(images).logits for images, _labels in loader])
    model.train(was_training)
    return logits


def logits_of_last_batch(model, loader):
    was_training = model.training
    logits = logits_mode_not_restored(model, list(loader)[-1:])
    model.train(was_training)
    return logits


# --- q10: judgement ------------------------------------------------------------------------------

RUBRIC = """\
1 point: believes the lower number, and says why: .98 was read on the images that the model was
  trained on (line 34), so it measures memory; the mended script reads images that were held out.
1 point: does not blame the other mends for the drop. A drop is what mending an optimistic measure
  looks like; whether the model itself is better or worse can only be said with both versions
  read on the same held-out images.
2 points: names at least three mistakes that raise no error (no split, batch_size without effect,
  nested predictions, BatchNorm in training mode) and gives for each a cheap check that would have
  caught it. Examples: train on shuffled labels and expect chance on the test set; count the
  optimizer steps per epoch; score the true labels against themselves and expect 1.0; predict one
  image alone and in a batch and expect the same logits. Half a point off for a check that
  could not fail ("look at the loss").
"""

QUESTIONS = [
    Question(
        id="04.q1",
        title="An optimizer that exists",
        points=1,
        cases=cases_optimizer,
        apply=apply_optimizer,
        expected=reference_optimizer,
        right=right_optimizer,
        rtol=1e-6,
        atol=1e-8,
        hint="torch.optim has AdamW. Give it every parameter, lr and weight_decay.",
        wrong={
            "original: import from transformers": optimizer_from_transformers,
            "Adam: decay goes into the gradient": optimizer_coupled,
            "weight_decay ignored": optimizer_default_decay,
            "bias left out": optimizer_without_bias,
            "plain SGD": optimizer_sgd,
        },
    ),
    Question(
        id="04.q2",
        title="Input that is an image",
        points=1,
        cases=cases_images,
        apply=apply_images,
        expected=reference_images,
        right=right_images,
        rtol=1e-5,
        atol=1e-5,
        hint=hint_images,
        wrong={
            "original: a text tokenizer": images_as_text,
            "reshape in place of permute": images_reshaped,
            "range [0, 1]": images_in_unit_range,
            "uint8 overflows": images_overflow,
            "channels last": images_channels_last,
            "float64": images_double_precision,
        },
    ),
    Question(
        id="04.q3",
        title="A test set that was never trained on",
        points=1,
        cases=cases_split,
        apply=apply_split,
        measure=measure_split,
        expected=reference_split,
        right=right_split,
        hint=hint_split,
        wrong={
            "original: train and test are the same": split_none,
            "the last block, unshuffled": split_last_block,
            "two independent permutations": split_independent,
            "test drawn with replacement": split_with_replacement,
            "train and test swapped": split_swapped,
        },
    ),
    Question(
        id="04.q4",
        title="Batches",
        points=1,
        cases=cases_batches,
        apply=apply_batches,
        measure=measure_batches,
        expected=reference_batches,
        right=right_batches,
        hint=hint_batches,
        wrong={
            "original: the whole set is the batch": batches_whole_set,
            "not shuffled": batches_in_order,
            "drops the last batch": batches_drop_last,
            "images shuffled without their labels": batches_unpaired,
            "shuffled once for all passes": batches_shuffled_once,
            "can be read only once": batches_one_pass_only,
        },
    ),
    Question(
        id="04.q5",
        title="A loss to go down",
        points=1,
        cases=cases_loss,
        apply=apply_loss,
        expected=reference_loss,
        right=right_loss,
        rtol=1e-6,
        atol=1e-8,
        hint="The model computes its own loss as soon as it is told what to compare with.",
        wrong={
            "original: labels not passed": loss_without_labels,
            "a number, cut off from the graph": loss_detached,
            "softmax before cross-entropy": loss_softmax_twice,
            "summed, not averaged": loss_summed,
            "its own predictions as labels": loss_of_own_predictions,
        },
    ),
    Question(
        id="04.q6",
        title="On the same device",
        points=1,
        cases=cases_device,
        apply=apply_device,
        expected=reference_device,
        right=right_device,
        hint="The model knows: next(model.parameters()).device. Labels move too.",
        wrong={
            "original: device is not defined": device_undefined,
            "guessed from the machine": device_guessed,
            "labels left behind": device_images_only,
            "moves the model, not the data": device_moves_the_model,
        },
    ),
    Question(
        id="04.q7",
        title="Two things, two names",
        points=1,
        cases=cases_labels,
        apply=apply_labels,
        expected=reference_labels,
        right=right_labels,
        hint="The loop variable must not have the name of the list.",
        wrong={
            "original: the list is shadowed": labels_shadowed,
            "only the last batch": labels_last_batch,
            "one list per batch": labels_nested,
            "one label per batch": labels_first_of_each_batch,
        },
    ),
    Question(
        id="04.q8",
        title="Accuracy by example",
        points=1,
        cases=cases_accuracy,
        apply=apply_accuracy,
        expected=reference_accuracy,
        right=right_accuracy,
        rtol=1e-9,
        atol=1e-9,
        hint="extend, not append; then divide by the number of examples.",
        wrong={
            "original: lists inside the list": accuracy_nested,
            "mean over batches": accuracy_mean_over_batches,
            "argmax over the examples": accuracy_wrong_axis,
            "a count, not a fraction": accuracy_as_count,
            "only the last batch": accuracy_of_last_batch,
        },
    ),
    Question(
        id="04.q9",
        title="A test that leaves the model alone",
        points=1,
        cases=cases_logits,
        apply=apply_logits,
        expected=reference_logits,
        right=right_logits,
        rtol=1e-6,
        atol=1e-8,
        hint=hint_logits,
        wrong={
            "original: training mode": logits_in_training_mode,
            "mode not put back": logits_mode_not_restored,
            "always back to training mode": logits_always_back_to_training,
            "builds a graph": logits_with_graph,
            "only the last batch": logits_of_last_batch,
        },
    ),
    Question(id="04.q10", title="The author writes back", points=4, manual=True, rubric=RUBRIC),
]
