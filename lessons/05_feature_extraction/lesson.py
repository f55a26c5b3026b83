# %% [markdown]
# # 05 Feature extraction
#
# A frozen network is a machine that turns an image into a list of numbers. Whoever wants to use it
# has three decisions to make: *where* to read the numbers, *what* to put on top of them, and how
# often to compute them. Each is usually made by habit. Each can be made in a few seconds by
# measuring, and then it sometimes comes out the other way.
#
# **Goals.** When you have worked through it you can
#
# 1. read any layer of any network, and decide by measurement which layer and which pooling;
# 2. say what computing features once saves, to the multiplication, and when it is not allowed;
# 3. put three heads on frozen features without a training loop (neighbours, class means, ridge
#    regression), derive each, and say what the scale of the features does to them.
#
# **Before this:** lessons 01 to 03. **Time:** about 75 minutes; the notebook itself runs in under a
# minute on two cores.
#
# **Expected result.** Over 20 epochs, computing features once saves exactly 19 of 20 passes through
# the backbone and gives the same head. With ten labels per class a ridge head on the last layer reads
# 0.65 [0.64, 0.67] of the test digits, random features 0.13, pixels 0.22. Flattening instead of
# averaging loses 6 points [3, 10] at 2 labels and gains 3 [2, 4] at 50 (validation). And the question "which
# photograph is behind it?" is answered best by the *first* layer; in the last one, the network with
# random weights knows more than the pre-trained one.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import copy
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# %%
from tlcourse.comparing import Comparison
from tlcourse.datasets import BatchLoader, augment_images, digit_scenes
from tlcourse.evaluation import mean_interval
from tlcourse.layers import LayerFeatures
from tlcourse.probing import Features, extract_layers, ridge_probe

num_draws = {"tiny": 10, "full": 20}[run.profile]  # of every live comparison below
torch.set_num_threads(1)  # a network this small gains nothing from a second core
threadpool_limits(1)  # neither do small matrices
BLUE, ORANGE, GREEN = tl.plots.palette[:3]

# %% [markdown]
# ## Before you run anything
#
# `glyphnet` was pre-trained on letters and symbols over photographs, and is now frozen. It has four
# layers, `stem`, `stage 0`, `stage 1`, `stage 2`. Write down four guesses.
#
# 1. Which layer's features tell digits apart best? And which layer's features tell best *which of
#    two photographs* lies behind the digit?
# 2. Same two questions for the same network with **random** weights. Is it ever better than the
#    pre-trained one?
# 3. Averaged over the image, the last layer gives 128 numbers; unaveraged, 2,048. Which is better
#    with 2 labels per class? With 50?
# 4. A head is trained for 20 epochs on frozen features. How many times cheaper is it to compute the
#    features once and keep them: 2, 5, or nearly 20?

# %% [markdown]
# ## The picture
#
# One image on its way through the network. Each column is a layer, each row one of its channels (the
# three that vary most over the image). On the left the network still holds a picture; on the right
# it holds a few coarse findings, each in many channels. The sizes are in the titles: channels x height x width.

# %%
backbone = tl.load_backbone("glyphnet").to(run.device)
layers = tl.freezing.layer_names(backbone)
short = dict(zip(layers, ("stem", "stage 0", "stage 1", "stage 2"), strict=True))
everything = tl.load_task("wild_digits", labels_per_class=None)
pool_images, val_images = everything.train, everything.val  # 700 to draw labels from, 300
print(layers)

# %% [markdown]
# How does one get at the middle of a network? PyTorch lets a module call us back with its output
# each time it has run. The call-back is named a **forward hook**. We note the output and go on.


# %%
def read(network, layer, images):
    """What one layer says of the images, (B, C, H, W), caught on its way."""
    caught = []
    part = network.get_submodule(layer)
    handle = part.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        network(images.to(run.device))
    handle.remove()  # a hook that is forgotten runs for ever
    return caught[0].cpu()


# %% jupyter={"source_hidden": true}
def draw_layers(image):
    """An image, and three channels of each layer."""
    fig, axes = tl.plots.subplots(3, 5, figsize=(9, 5.4))
    for ax in axes.flat:
        ax.axis("off")
    axes[1, 0].imshow(image.permute(1, 2, 0) / 2 + 0.5)
    axes[1, 0].set_title("image\n3 x 32 x 32", fontsize=10)
    for column, layer in enumerate(layers, start=1):
        maps = read(backbone, layer, image[None])[0]
        size = " x ".join(str(side) for side in maps.shape)
        axes[0, column].set_title(f"{short[layer]}\n{size}", fontsize=10)
        loudest = maps.var(dim=(1, 2)).argsort(descending=True)
        for row in range(3):
            axes[row, column].imshow(maps[loudest[row]], cmap="Blues")
    return fig


# %%
words = "A digit over a photograph, then three maps of each layer: edges first, coarse blots last."
tl.plots.alt(draw_layers(val_images.inputs[30]), words)

# %% [markdown]
# ## From a map to a vector
#
# A layer gives a map for each channel; a head wants one vector. Let $a_{cp}$ be channel $c$ at place
# $p$, for $C$ channels and $P$ places. The usual ways:
#
# - **mean**: $h_c = \frac1P \sum_p a_{cp}$, so $C$ numbers: *how much* of it is there?
# - **max**: $h_c = \max_p a_{cp}$, so $C$ numbers: is it *anywhere*?
# - **both**, side by side: $2C$ numbers;
# - **flatten**: all $a_{cp}$, so $CP$ numbers: how much is there *at each place*?

# %% tags=["nbval-check-output"]
maps = read(backbone, layers[-1], val_images.inputs)  # (300, 128, 4, 4)
by_hand = {
    "mean": maps.mean(dim=(2, 3)),
    "max": maps.amax(dim=(2, 3)),
    "mean+max": torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1),
    "flatten": maps.flatten(1),
}
with torch.no_grad():
    for how, vectors in by_hand.items():
        library = LayerFeatures(backbone, layers[-1], how)(val_images.inputs.to(run.device)).cpu()
        torch.testing.assert_close(vectors, library, rtol=1e-4, atol=1e-4)
        print(f"{how:8}  {tuple(vectors.shape)}  equals the library's")

# %% [markdown]
# (`LayerFeatures` also stops the forward pass at the layer, as nothing after it is needed. It takes
# the place of a backbone wherever the library wants one.)
#
# How are these related? Put a linear head on the mean. With a weight $v_{kc}$ for class $k$,
#
# $$z_k = \sum_c v_{kc}\, \frac1P \sum_p a_{cp} = \sum_c \sum_p \underbrace{\frac{v_{kc}}{P}}_{w_{kcp}} a_{cp} .$$
#
# That is a head on the flattened map, whose weight $w_{kcp}$ happens to be *the same at each place*.
# So everything that a head on the mean can say, a head on flatten can say too, and much more: it has
# $P$ times as many weights. With endless labels flatten cannot lose. With few labels it must find
# out from the data what the mean was told for free: that a stroke is a stroke wherever it is.

# %%
V = torch.randn(10, 128)
tied = V.repeat_interleave(16, dim=1) / 16  # (10, 2048): each weight at 16 places
torch.testing.assert_close(by_hand["flatten"] @ tied.T, by_hand["mean"] @ V.T, rtol=1e-4, atol=1e-4)

# %% [markdown]
# Guess 3 is about this trade. We hold it until the tools are ready.
#
# ## Once, or in every epoch?
#
# The weights are frozen, so an image has the same features in epoch 20 as in epoch 1. Let us keep
# accounts. One forward pass of one image costs $f$, one step of the head, forward and backward,
# costs $g$ per image. There are $n$ images and $E$ epochs.
#
# $$\text{every epoch: } E\,n\,(f + g), \qquad \text{once: } n f + E\,n\,g, \qquad
# \text{ratio} = \frac{E\,(f+g)}{f + E g} = E\,\frac{1 + r}{1 + E r}, \quad r = \frac gf .$$
#
# If the head is cheap ($r \to 0$) the ratio is $E$: each epoch but the first was waste. For endless
# epochs it tends to $1 + 1/r$: then the head alone is what is left to pay. How cheap is ours? Count.

# %% tags=["nbval-check-output"]
with FlopCounterMode(display=False) as counter, torch.no_grad():
    backbone(val_images.inputs[:1].to(run.device))
f = counter.get_total_flops() // 2  # one multiplication and one addition make two operations
g = 2 * 10 * 128  # forward, and the weight product dZ^T H of lesson 03
print(f"multiplications per image: backbone {f:,}, head {g:,}, r = {g / f:.5f}")
for epochs in (1, 20, 100):
    print(f"{epochs:4} epochs: {epochs * (f + g) / (f + epochs * g):6.2f} times cheaper")

# %% [markdown]
# Now do it both ways. The head is softmax regression, trained by SGD with the gradient of lesson 03,
# $dZ = (P - Y)/n$ and $dV = dZ^\top H$. The images, their order, and the start are the same. We count
# each image that passes the backbone, and the CPU time.


# %%
class Counted(nn.Module):
    """A backbone that counts the images it is shown."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.num_images = backbone, 0

    def forward(self, images):
        self.num_images += len(images)
        return self.backbone(images)


# %%
@torch.no_grad()
def train_head(batches, features_of, num_epochs=20, lr=0.1):
    """Softmax regression by SGD; returns weight (K, d) and bias (K,)."""
    V, c = torch.zeros(10, 128), torch.zeros(10)
    for _ in range(num_epochs):
        for inputs, targets in batches:
            H = features_of(inputs)  # (B, d)
            dZ = ((H @ V.T + c).softmax(dim=1) - F.one_hot(targets, 10)) / len(targets)
            V -= lr * dZ.T @ H
            c -= lr * dZ.sum(dim=0)
    return V, c


# %%
split = tl.load_task("wild_digits", labels_per_class=50, seed=0).train  # 500 images
backbone.eval()
again = Counted(backbone)
start = time.process_time()
images_in_order = BatchLoader(split.inputs, split.targets, 50, shuffle=True, seed=0)
head_again = train_head(images_in_order, lambda images: again(images.to(run.device)).cpu())
seconds_again = time.process_time() - start

# %% [markdown]
# Now once. The images come in the same order; what lies in the batches are features.

# %%
once = Counted(backbone)
start = time.process_time()
cached = tl.extract_features(once, BatchLoader(split.inputs, split.targets, 250))
seconds_extraction = time.process_time() - start
features_in_order = BatchLoader(
    torch.from_numpy(cached.features), split.targets, 50, shuffle=True, seed=0
)
head_once = train_head(features_in_order, lambda features: features)
seconds_once = time.process_time() - start

# %% [markdown]
# First what can be counted, and whether the two heads agree.

# %% tags=["nbval-check-output"]
print(f"images through the backbone: {again.num_images:,} against {once.num_images:,}")
assert again.num_images == 20 * once.num_images == 20 * 500
for one, other in zip(head_again, head_once, strict=True):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
print("the two heads are the same")

# %%
r_clock = (seconds_once - seconds_extraction) / 20 / seconds_extraction
print(f"CPU seconds: {seconds_again:.2f} every epoch, {seconds_once:.3f} once")
print(f"{seconds_again / seconds_once:.1f} times cheaper on the clock")
expected = 20 * (1 + r_clock) / (1 + 20 * r_clock)
print(f"the account, with r = {r_clock:.4f} from the clock: {expected:.1f}")
kept, given = (array.nbytes / 1e6 for array in (cached.features, split.inputs))
print(f"kept: {kept:.2f} MB; the images: {given:.2f} MB")

# %% [markdown]
# The same head, for one twentieth of the passes: guess 4. On the clock the saving is a little below
# 20, because there $r$ is larger than the count of multiplications says: each small step also pays for
# being started. (Seconds differ from machine to machine, so nothing is claimed about them.)
#
# The number 20 is not a property of the network; it is the number of epochs. And once the features are
# kept, the second experiment is free, and the hundredth: that is what the rest of this lesson lives on.
#
# Note the last line, too. These features are smaller than the images. Flattened maps need not be:
# those of the stem are 8,192 numbers for an image of 3,072.

# %% jupyter={"source_hidden": true}
epochs = np.arange(1, 101)
fig, ax = tl.plots.subplots(figsize=(7, 3.4))
for r, color, line in ((0.0, BLUE, "-"), (0.01, ORANGE, "--"), (0.1, GREEN, ":")):
    ax.plot(epochs, epochs * (1 + r) / (1 + epochs * r), color=color, ls=line, label=f"r = {r:g}")
ax.set(xlabel="epochs E", ylabel="times cheaper", xlim=(0, 100), ylim=(0, 100))
ax.legend(title="head : backbone")
words = (
    "Three curves over the epochs: r = 0 is the diagonal, 0.01 bends to 51, 0.1 flattens below 11."
)
tl.plots.alt(ax, words)

# %% [markdown]
# ### When the cache lies
#
# The account assumed that an image *has* features. Three common settings break that.
#
# **Augmentation.** A turned image is another image. **BatchNorm in training mode**: the features of
# an image depend on the others in its batch, and the running averages move with each batch, although
# no weight is trained. **Fine-tuning**: the backbone moves, and the kept features are those of a
# network that no longer exists. Watch all three. The scale is the mean distance between the features
# of two different images; 0 would mean that the cache is right.


# %%
def moved(before, after):
    """Mean distance between two versions, over that between different images."""
    apart = (before[:, None] - before[None]).norm(dim=2)  # (n, n), zeros on the diagonal
    count = len(before)
    return ((after - before).norm(dim=1).mean() / (apart.sum() / (count * (count - 1)))).item()


def features_of(network, images):
    with torch.no_grad():
        return network(images.to(run.device)).cpu()


# %%
some = split.inputs[::5]  # 100 images
turned = augment_images(some, torch.Generator().manual_seed(0))
stale = {"augmented": moved(features_of(backbone, some), features_of(backbone, turned))}

normed = tl.load_backbone("glyphnet_bn").to(run.device).train()  # BatchNorm, training mode
whole = features_of(normed, some)
halves = torch.cat([features_of(normed, some[:50]), features_of(normed, some[50:])])
stale["BatchNorm, other companions"] = moved(whole, halves)
fresh = tl.load_backbone("glyphnet_bn").to(run.device).eval()
stale["BatchNorm, after having looked"] = moved(
    features_of(fresh, some), features_of(normed.eval(), some)
)
in_halves = torch.cat([features_of(fresh, some[:50]), features_of(fresh, some[50:])])
in_order = moved(features_of(fresh, some), in_halves)  # evaluation mode

# %% [markdown]
# The third: ten steps of fine-tuning, on a copy.

# %%
tuned = tl.Classifier(copy.deepcopy(backbone), 10).to(run.device)
ten_steps = tl.TrainConfig(lr=1e-3, num_steps=10, progress=False)
tl.fit(tuned, BatchLoader(split.inputs, split.targets, 32, shuffle=True), None, ten_steps)
stale["after 10 steps of fine-tuning"] = moved(
    features_of(backbone, some), features_of(tuned.backbone.eval(), some)
)
for reason, distance in stale.items():
    print(f"{reason:30} {distance:.2f}")
print(f"{'BatchNorm, evaluation mode':30} {in_order:.2f}")
assert in_order < 1e-3 and min(stale.values()) > 0.02

# %% [markdown]
# So a cache is right for a *frozen* network in *evaluation mode*, on images that *do not change*. If
# the images must change, there is a middle way: draw $m$ augmented copies of each image, once, and
# keep the features of all. It costs $(m + 1)\,n f$ instead of $E\,n f$, and is worth it while
# $m + 1 < E$. Whether the copies gain anything we measure below.
#
# ## A head without steps
#
# Cached features of a few hundred images are a small table. For a small table one does not need SGD.
# Softmax regression has no closed form, because $p$ depends on the weights through an exponential.
# Ask for less: let the *scores themselves* be near the one-hot targets, in squares.
#
# | symbol | shape | meaning |
# |---|---|---|
# | $H,\ \bar h$ | $(n, d),\ (d)$ | features, and their mean |
# | $Y,\ \bar y$ | $(n, K),\ (K)$ | one-hot targets, and their mean |
# | $V,\ b$ | $(K, d),\ (K)$ | weight and bias of the head |
# | $\lambda$ | a number, $> 0$ | strength of the penalty; the library's $C$ is $1/\lambda$ |
#
# $$J(V, b) = \tfrac12 \sum_i \lVert V h_i + b - y_i \rVert^2 + \tfrac{\lambda}{2} \lVert V \rVert^2 .$$
#
# **The bias first.** It carries no penalty. $\partial J/\partial b = \sum_i (V h_i + b - y_i) = 0$
# gives $b = \bar y - V \bar h$. Put it in, and only differences from the mean are left: with
# $X = H - \bar h$ and $T = Y - \bar y$ (row by row), $J = \frac12 \lVert X V^\top - T \rVert^2 + \frac\lambda2 \lVert V \rVert^2$.
#
# **Then the weight.** Its gradient is *claimed minus true, times what came in*, as in lesson 03, only
# that the claim is linear:
#
# $$\frac{\partial J}{\partial V} = (X V^\top - T)^\top X + \lambda V = 0
# \quad\Longrightarrow\quad V\,(X^\top X + \lambda I) = T^\top X .$$
#
# The matrix in brackets is positive definite for $\lambda > 0$, so there is exactly one solution.
# This is **ridge regression**, and one call of `solve`.


# %%
def ridge(H, targets, penalty, num_classes=10):
    """Weight (K, d) and bias (K,) that minimise J."""
    Y = np.eye(num_classes)[targets]
    X, T = H - H.mean(axis=0), Y - Y.mean(axis=0)
    V = np.linalg.solve(X.T @ X + penalty * np.eye(X.shape[1]), X.T @ T).T
    return V, Y.mean(axis=0) - V @ H.mean(axis=0)


# %% [markdown]
# To have something to fit, the features of 700 images to draw labels from and of 300 validation images,
# from all layers, pooled in all ways. `extract_layers` is our hook on every layer at once: one forward
# pass for each image.


# %%
def labelled(count, seed):
    """Which of the 700 images are labelled: count of each class, drawn by seed."""
    return tl.load_task("wild_digits", count, seed).train.ids.numpy()


loaders = {
    name: BatchLoader(part.inputs, part.targets, 250)
    for name, part in (("pool", pool_images), ("val", val_images))
}
cache = {
    name: extract_layers(backbone, loader, layers, ("mean", "max", "mean+max", "flatten"))
    for name, loader in loaders.items()
}  # "pool" or "val" -> (layer, pooling) -> features; one forward pass per image
last = (layers[-1], "mean")
pool, val = cache["pool"][last], cache["val"][last]

# %% tags=["nbval-check-output"]
for how, vectors in by_hand.items():
    np.testing.assert_allclose(cache["val"][layers[-1], how].features, vectors, rtol=1e-4, atol=1e-4)
train = pool.take(labelled(10, seed=0))
H = train.features.astype(np.float64)  # (100, 128)
V, b = ridge(H, train.targets, penalty=100.0)
library = ridge_probe(train, val, c_grid=[1 / 100], standardise=False)
sklearn = Ridge(alpha=100.0).fit(H, np.eye(10)[train.targets])
np.testing.assert_allclose(V, library.weight, rtol=1e-6, atol=1e-9)
np.testing.assert_allclose(V, sklearn.coef_, rtol=1e-6, atol=1e-9)
np.testing.assert_allclose(b, sklearn.intercept_, rtol=1e-6, atol=1e-9)
print("by hand, library and scikit-learn agree")

# %% [markdown]
# ### The same head, seen from the examples
#
# $X^\top X$ is $d \times d$. Flattened maps have $d = 2{,}048$ and more, with 100 examples. There is
# a second form, and it tells a story of its own. Start from what is obvious,
#
# $$(X^\top X + \lambda I)\, X^\top = X^\top X X^\top + \lambda X^\top = X^\top (X X^\top + \lambda I),$$
#
# and multiply by both inverses: $X^\top (X X^\top + \lambda I)^{-1} = (X^\top X + \lambda I)^{-1} X^\top$.
# So
#
# $$V^\top = X^\top A, \qquad A = (X X^\top + \lambda I)^{-1}\, T ,$$
#
# with an $n \times n$ matrix to solve. Read what it says of a new image with $x = h - \bar h$:
#
# $$V x = \sum_i A_i\, (x_i \cdot x) .$$
#
# Every labelled image casts a vote $A_i$, weighted by how similar it is to the new one. A linear
# probe is a *vote among examples*. Keep that in mind until we come to the neighbours.
#
# And if the penalty is huge? Then $A$ is about $T/\lambda$, and row $k$ of $V$ becomes
# $\frac1\lambda \sum_i T_{ik}\, x_i$. For equally frequent classes that is
# $\frac{n_k}{\lambda}\,(\mu_k - \bar h)$, with $\mu_k$ the mean feature of class $k$ and $n_k$ its
# number of examples: the head of **class means**, for which nothing was fitted at all.

# %%
X, T = H - H.mean(axis=0), np.eye(10)[train.targets] - 0.1
A = np.linalg.solve(X @ X.T + 100.0 * np.eye(len(X)), T)  # (n, K): each example's vote
np.testing.assert_allclose(A.T @ X, V, rtol=1e-6, atol=1e-9)

penalty = 1e9
means = np.stack([X[train.targets == label].mean(axis=0) for label in range(10)])
limit, _ = ridge(H, train.targets, penalty)
np.testing.assert_allclose(limit * penalty, 10 * means, rtol=1e-3, atol=1e-3)

# %% [markdown]
# Is the short cut as good as softmax regression? Ten draws of ten labels per class. Both standardise
# the features (the next section says what that is), both choose $C$ on the validation images, and
# we look at validation accuracy. *All* scores are validation scores until the section "The test
# set, once".


# %%
SOFTMAX_GRID = (0.001, 0.01, 0.1)


def on_val(probe, rows, place=last, **options):
    """Validation accuracy of a probe fitted to some rows of the pool; C is chosen there, too."""
    train, val = cache["pool"][place].take(rows), cache["val"][place]
    return probe(train, val, val, **options).accuracy


# %%
heads = {"ridge": [], "softmax": []}
for seed in range(num_draws):
    rows = labelled(10, seed)
    heads["ridge"].append(on_val(ridge_probe, rows))
    heads["softmax"].append(on_val(tl.linear_probe, rows, c_grid=SOFTMAX_GRID))
heads = Comparison(heads)
for head in heads.scores:
    print(f"{head:8} {heads.interval(head)}")

# %%
gap = heads.difference("ridge", "softmax")
print(f"ridge minus softmax: {gap}")
assert abs(gap.mean) < 0.04

# %% [markdown]
# As good, within a point or two, and a fit takes a few milliseconds. So from here on we *scan*: any
# layer, any pooling, any number of labels.
#
# ## The scale of a feature is a prior
#
# An L2 penalty adds up squares of weights. Squares of *what units*? Change the unit of feature $j$:
# $x'_j = s_j x_j$ (metres to millimetres, $s = 1000$). The same scores now need the weight
# $v'_j = v_j / s_j$, and the penalty that is paid for the same function changes:
#
# $$\frac\lambda2 \sum_j v_j'^2 = \frac{\lambda}{2} \sum_j \frac{v_j^2}{s_j^2} .$$
#
# A feature in large numbers is nearly free of penalty; one in small numbers is nearly forbidden.
# Nobody decided that. If *all* features are scaled by the same $s$, it is the same as $\lambda / s^2$,
# and a search over $\lambda$ makes up for it. If they are scaled differently, no $\lambda$ does.

# %%
same, _ = ridge(10 * H, train.targets, penalty=100.0 * 10**2)  # scaled, and penalty times s^2
np.testing.assert_allclose(10 * same, V, rtol=1e-6, atol=1e-9)

units = np.where(np.arange(128) % 2, 100.0, 1.0)  # every second feature in other units
other, _ = ridge(H * units, train.targets, penalty=100.0)
difference = np.abs(other * units - V).max() / np.abs(V).max()
print("all scaled alike: the same head")
print(f"every second one scaled: a weight has moved by {difference:.0f} times the largest weight")
assert difference > 0.5

# %% [markdown]
# **Standardising** gives every feature mean 0 and deviation 1, so that each pays the same price. Mean
# and deviation come from the *training* images and are then part of the model, like its weights:

# %%
mean, deviation = H.mean(axis=0), H.std(axis=0)
standard = (H - mean) / deviation
np.testing.assert_allclose(standard, StandardScaler().fit_transform(H), rtol=1e-6, atol=1e-9)
V_s, b_s = ridge(standard, train.targets, penalty=100.0)
folded = V_s / deviation  # a head for raw features that says the same
library = ridge_probe(train, val, c_grid=[1 / 100])
np.testing.assert_allclose(folded, library.weight, rtol=1e-6, atol=1e-9)
np.testing.assert_allclose(b_s - folded @ mean, library.bias, rtol=1e-6, atol=1e-9)

# %% [markdown]
# (The last lines fold the standardisation into the head: $V_s\,\frac{h - \text{mean}}{\text{deviation}} + b_s$
# is linear in $h$. Nothing has to be remembered but a weight and a bias. `tl.linear_probe` does the
# same.)
#
# **Guess.** Does standardising help here? Three tables of features: the last layer; the last layer
# with three columns more, the image's mean red, green and blue *from 0 to 255*, as they might come
# out of a database; and the last two layers side by side.


# %%
def widened(name, images):
    colour = (images.inputs.mean(dim=(2, 3)).numpy() / 2 + 0.5) * 255
    columns = {
        "last layer": cache[name][last].features,
        "last layer and colour": np.hstack([cache[name][last].features, colour]),
        "last two layers": np.hstack(
            [cache[name][place, "mean"].features for place in layers[-2:]]
        ),
    }
    return {key: Features(value, images.targets.numpy()) for key, value in columns.items()}


def scaled(train, val):
    mean, deviation = train.features.mean(axis=0), train.features.std(axis=0)
    return [Features((part.features - mean) / deviation, part.targets) for part in (train, val)]


# %%
tables, grid = (widened("pool", pool_images), widened("val", val_images)), 10.0 ** np.arange(-6, 5)


def gain_of_standardising(name, count, seed):
    """Accuracy with minus without: of ridge, and of the nearest neighbour."""
    train, val = tables[0][name].take(labelled(count, seed)), tables[1][name]
    ways = [ridge_probe(train, val, val, grid, standardise=way).accuracy for way in (True, False)]
    raw, standard = tl.knn(train, val, 1, "euclidean"), tl.knn(*scaled(train, val), 1, "euclidean")
    return ways[0] - ways[1], standard - raw

# %% [markdown]
# For each of the three tables and three numbers of labels, the gain over paired draws.

# %%
gains = {}
for name in tables[0]:
    for count in (2, 10, 50):
        found = [gain_of_standardising(name, count, seed) for seed in range(num_draws)]
        gains[name, count] = [mean_interval(column) for column in zip(*found, strict=True)]

# %%
print("accuracy with standardising minus without")
print(f"{'features':22} labels  ridge                     nearest neighbour")
for (name, count), (by_ridge, by_neighbours) in gains.items():
    signed = [f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]" for x in (by_ridge, by_neighbours)]
    print(f"{name:22} {count:6}  {signed[0]}  {signed[1]}")

# %%
kinds = {short[layer]: cache["pool"][layer, "mean"].features for layer in layers[-2:]}
kinds["colour"] = tables[0]["last layer and colour"].features[:, -3:]
for name, columns in kinds.items():
    print(f"{name}: median deviation of a column {np.median(columns.std(axis=0)):.2f}")
assert all(abs(gains["last layer", count][0].mean) < 0.04 for count in (2, 10, 50))
assert min(gains["last layer and colour", count][1].low for count in (2, 10, 50)) > 0.15
assert gains["last layer and colour", 2][0].low > 0.03
assert gains["last two layers", 50][0].low > 0.005 > gains["last two layers", 2][0].mean

# %% [markdown]
# Three answers. **The last layer by itself: nothing.** Its 128 features come out of a normalisation
# layer and an average, so most of their scales are within a factor of three already. The intervals
# contain zero.
#
# **With three columns from 0 to 255: the neighbours are lost without it.** A distance adds squares of
# *numbers*, and three columns that vary by 30 drown 128 that vary by less than one. Ridge is hardly
# harmed from 10 labels on. For it, a column in large numbers is nearly free of penalty, and what is free
# is overfitted, but only while labels are few. That is the derivation above, seen twice.
#
# **Two layers side by side: it depends.** The numbers of the lower layer are some ten times smaller
# (the last lines printed). Left as they are, they speak softly, and the upper layer, which is better, has the say.
# Standardised, they all speak alike: at 2 labels per class that costs, at 50 it pays. The scale of a
# feature is a prior on how much it may matter. Standardising does not remove the prior; it replaces
# an accident by a flat one. That is a good default and not a law.
#
# ### Never with the statistics of the test set
#
# "I standardise the test features by *their own* mean and deviation." On a big, well-mixed test set
# you will hardly see a difference, and that is what makes the mistake live long. Here are 300 images
# judged by one and the same head, standardised in four ways.


# %%
def judged(groups, own_statistics):
    """Validation accuracy of the standardised head, for images that arrive in groups."""
    hits = 0
    for group in groups:
        H = val.features[group]
        middle, spread = (H.mean(axis=0), H.std(axis=0)) if own_statistics else (mean, deviation)
        scores = (H - middle) / np.where(spread > 1e-6, spread, 1.0) @ V_s.T + b_s
        hits += (scores.argmax(axis=1) == val.targets[group]).sum()
    return hits / len(val.targets)


# %%
by_digit = [np.flatnonzero(val.targets == digit) for digit in range(10)]
one_by_one, together = np.arange(300)[:, None], [np.arange(300)]
leak = {
    "statistics of the training images": judged(together, False),
    "their own, all 300 together": judged(together, True),
    "their own, one digit at a time": judged(by_digit, True),
    "their own, one image at a time": judged(one_by_one, True),
}
for way, score in leak.items():
    print(f"{way:34} {score:.3f}")
fair, batched, sorted_by_digit, single = leak.values()
assert abs(batched - fair) < 0.06 and sorted_by_digit < fair - 0.2 and single < 0.2

# %% [markdown]
# With all 300 together nothing shows. Let the images arrive in another way and the same head falls
# apart: a batch of sevens, seen from its own mean, has nothing seven-like left in it. A single image is
# its own mean, so it is all zeros, and every image gets the same answer. With the statistics of the test
# set one has a classifier of *collections*, not of images, and it needs the whole collection before the
# first answer.
#
# ## Neighbours
#
# The oldest head needs no fitting: look up the $k$ labelled images most similar to the new one, and
# let them vote. *Similar* can mean a small Euclidean distance or a high cosine. With vectors of
# length one the two agree, as
#
# $$\lVert x - z \rVert^2 = \lVert x \rVert^2 + \lVert z \rVert^2 - 2\, x \cdot z = 2 - 2 \cos(x, z) .$$
#
# So the choice is about one thing: does the *length* of a feature vector mean something? A long vector
# says "much of everything", which is often contrast. The cosine ignores it.


# %%
def unit(H):
    return H / np.linalg.norm(H, axis=1, keepdims=True)


def vote_shares(train, H, k):
    """Shares of the votes that each class gets from the k nearest, (M, K)."""
    similarity = unit(H) @ unit(train.features).T  # (M, n)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.eye(10)[train.targets[nearest]].mean(axis=1)


# %% tags=["nbval-check-output"]
for k in (1, 5, 20):
    shares = vote_shares(train, val.features, k)
    accuracy = (shares.argmax(axis=1) == val.targets).mean()  # equal votes: the smaller class
    assert abs(accuracy - tl.knn(train, val, k)) < 0.01
units = [Features(unit(part.features), part.targets) for part in (train, val)]
assert tl.knn(*units, 5, "euclidean") == tl.knn(train, val, 5, "cosine")
print("by hand and library agree; on unit vectors, cosine and Euclid agree")

# %% [markdown]
# ### How many neighbours?
#
# Let $\hat p$ be the vote shares for one image, and $y$ its one-hot truth. Another draw of labelled
# images would give another $\hat p$. Over draws, with $\bar p = \mathbb{E}\,\hat p$,
#
# $$\mathbb{E}\,\lVert \hat p - y \rVert^2 = \lVert \bar p - y \rVert^2 + \mathbb{E}\,\lVert \hat p - \bar p \rVert^2 ,$$
#
# because the cross term $2\,\mathbb{E}(\hat p - \bar p)\cdot(\bar p - y)$ is zero. The first part is
# **bias** (squared): what is wrong even on average over draws. The second is **variance**: what hangs
# on the draw. Two ends are known before measuring. At $k = 1$, $\hat p$ is one-hot, each error costs
# $2$ and each hit $0$. At $k = n$ everybody always votes: no variance, $\hat p = 1/10$ for each class,
# and the bias is $(1 - \frac1{10})^2 + 9 \cdot (\frac1{10})^2 = 0.9$.

# %%
many_draws, truth = [pool.take(labelled(10, seed)) for seed in range(20)], np.eye(10)[val.targets]
ks = (1, 2, 3, 5, 7, 10, 15, 20, 40, 70, 100)
parts = {"bias": [], "variance": [], "sum": []}
for k in ks:
    p = np.stack([vote_shares(train, val.features, k) for train in many_draws])  # (draws, M, K)
    average = p.mean(axis=0)
    parts["bias"].append(((average - truth) ** 2).sum(axis=1).mean())
    parts["variance"].append(((p - average) ** 2).sum(axis=2).mean())
    parts["sum"].append(((p - truth) ** 2).sum(axis=2).mean())
parts = {name: np.array(values) for name, values in parts.items()}

# %%
fig, ax = tl.plots.subplots(figsize=(7, 3.6))
for (name, values), color, marker in zip(
    parts.items(), (BLUE, ORANGE, "black"), "os^", strict=True
):
    ax.plot(ks, values, color=color, marker=marker, ms=5, label=name)
ax.set(xscale="log", xlabel="neighbours k, of 100 labelled images", ylabel="squared error")
ax.set_xticks(ks, [str(k) for k in ks])
ax.minorticks_off()
ax.legend()
words = (
    "Over k, bias rises from 0.44 to 0.9, variance falls from 0.49 to 0; the sum is least near 5."
)
tl.plots.alt(ax, words)

# %% [markdown]
# Do the two parts add up, as the formula says? Is the end at $k = n$ the one that we computed? And
# where is the sum least?

# %%
np.testing.assert_allclose(parts["bias"] + parts["variance"], parts["sum"], atol=1e-9)
np.testing.assert_allclose(parts["sum"][-1], 0.9, atol=1e-9)
assert (np.diff(parts["bias"]) > 0).all() and (np.diff(parts["variance"]) < 0).all()
print(f"the sum is least at k = {ks[int(parts['sum'].argmin())]}")
assert 2 <= ks[int(parts["sum"].argmin())] <= 20
falls = parts["variance"][0] / parts["variance"][ks.index(10)]
print(f"from 1 to 10 neighbours the variance falls {falls:.1f} times")
assert 5 < falls < 15

# %% [markdown]
# A single neighbour is a coin toss between draws. A hundred neighbours are the same crowd for
# everyone. The variance falls almost as $1/k$, as an average of independent votes would; the bias
# rises once neighbours must be fetched from other classes, and with ten images of each class that
# begins early. A useful bound: more neighbours than labels per class are never *all* right.
#
# ### One family
#
# Look at the three heads beside each other. Each scores class $k$ by a vote among examples:
#
# | head | the vote of example $i$ for an image | is fitted |
# |---|---|---|
# | $k$ nearest neighbours | 1 if it is among the nearest, else 0 | nothing |
# | class means | its similarity $x_i \cdot x$ | nothing |
# | ridge (linear probe) | its similarity, times a fitted $A_i$ | $n \times K$ numbers, or $K \times d$ |
#
# Neighbours can draw any boundary and pay with variance. Class means draw straight boundaries only,
# fixed by $K$ averages. (To be nearest in *distance*, each class also gets a constant,
# $-\lVert\mu_k\rVert^2/2$.) The probe draws straight ones, too, and its $\lambda$ says how far they may
# leave those of the class means. **Guess** which is ahead at 2 labels per class, and which at 50.


# %%
def class_means(train, val):
    """Accuracy of the nearest class mean: |h - mu|^2 = |h|^2 - 2 (mu . h - |mu|^2 / 2)."""
    mu = np.stack([train.features[train.targets == label].mean(axis=0) for label in range(10)])
    scores = val.features @ mu.T - (mu**2).sum(axis=1) / 2  # a linear head, in fact
    return (scores.argmax(axis=1) == val.targets).mean()


def best_knn(train, val):
    """Accuracy at the k that suits the validation images best."""
    return max(tl.knn(train, val, k) for k in (1, 3, 5, 10, 20) if k <= len(train.targets))


# %%
by_head = {}
for count in (2, 10, 50):
    scores = {"neighbours": [], "class means": [], "ridge": []}
    for seed in range(num_draws):
        rows = labelled(count, seed)
        scores["neighbours"].append(best_knn(pool.take(rows), val))
        scores["class means"].append(class_means(pool.take(rows), val))
        scores["ridge"].append(on_val(ridge_probe, rows))
    by_head[count] = Comparison(scores)
    print(f"{count:2} labels: " + ", ".join(f"{n} {by_head[count].interval(n)}" for n in scores))

# %%
for count, comparison in by_head.items():
    over_knn = comparison.difference("ridge", "neighbours")
    over_means = comparison.difference("ridge", "class means")
    print(f"{count:2} labels: ridge minus neighbours {over_knn}, minus class means {over_means}")
assert min(by_head[count].difference("ridge", "neighbours").low for count in (10, 50)) > 0.01
assert by_head[50].difference("ridge", "class means").low > 0.005

# %% [markdown]
# At 2 labels per class the three cannot be told apart, and in two of them nothing was fitted. At 10 the
# class means still keep up with ridge; neighbours fall behind. At 50 ridge is ahead of both: it is the
# only one that learns which directions do *not* matter, and it needs labels for that.
#
# ## Which layer?
#
# Now guesses 1 and 2. For each layer, averaged over the image: the pre-trained network, and the same
# network with random weights (five of them; draw $i$ uses the $i$-th, in turn). Ten labels per class.
# The control without any network is ridge regression on the pixels.

# %%
random_nets = [tl.load_backbone("glyphnet", pretrained=False, seed=seed) for seed in range(5)]


def tables_of(networks, loaders):
    """Layer -> for each network its features of the pool and of the validation images."""
    found = {layer: [] for layer in layers}
    for network in networks:
        parts = [extract_layers(network.to(run.device), loader, layers) for loader in loaders]
        for layer in layers:
            found[layer].append([part[layer, "mean"] for part in parts])
    return found

# %% [markdown]
# One accuracy for each draw; then that for each layer and each arm.

# %%
def accuracies(tables, rows_of):
    """One validation accuracy for each draw; where there are several networks, they take turns."""
    scores = []
    for seed in range(num_draws):
        train, val = tables[seed % len(tables)]
        scores.append(ridge_probe(train.take(rows_of(seed)), val, val).accuracy)
    return scores


# %%
def scan(tables, rows_of):
    """Arm -> layer -> accuracies."""
    return {
        arm: {layer: accuracies(found[layer], rows_of) for layer in layers}
        for arm, found in tables.items()
    }


# %%
def digit_rows(seed):
    return labelled(10, seed)


networks = {"pre-trained": [backbone], "random": random_nets}
digit_tables = {arm: tables_of(nets, loaders.values()) for arm, nets in networks.items()}
digit = scan(digit_tables, digit_rows)
pixels = [tl.extract_features(nn.Flatten(), loader) for loader in loaders.values()]
digit_pixels = accuracies([pixels], digit_rows)

# %% [markdown]
# The second question uses the same digits, each over a patch of one of two photographs, a flower or a
# temple, by the toss of a coin. (The temple lay behind the glyphs in pre-training; the flower is new.) The label is the photograph. Ten labelled images of each.

# %%
coin = torch.rand(1797, generator=torch.Generator().manual_seed(1)) < 0.5
scenes = torch.where(coin[:, None, None, None], digit_scenes("china"), digit_scenes("flower"))
photo_loaders = [
    BatchLoader(scenes[part.ids], coin[part.ids].long(), 250) for part in (pool_images, val_images)
]
photo_targets = coin[pool_images.ids].numpy()


def photo_rows(seed):
    chance = np.random.default_rng(seed)
    sides = [np.flatnonzero(photo_targets == side) for side in (False, True)]
    return np.concatenate([chance.choice(side, 10, replace=False) for side in sides])


# %%
photo_tables = {arm: tables_of(nets, photo_loaders) for arm, nets in networks.items()}
photo = scan(photo_tables, photo_rows)
three_numbers = [
    Features(x.inputs.mean(dim=(2, 3)).numpy(), x.targets.numpy()) for x in photo_loaders
]
photo_colour = accuracies([three_numbers], photo_rows)

# %%
fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9.5, 3.6))
panels = ((left, digit, 0.1, "which digit?"), (right, photo, 0.5, "which photograph?"))
for ax, found, chance, title in panels:
    for (arm, scores), color, marker in zip(found.items(), (BLUE, ORANGE), "os", strict=True):
        x = [mean_interval(scores[layer]) for layer in layers]
        spread = [[i.mean - i.low for i in x], [i.high - i.mean for i in x]]
        ax.errorbar(range(4), [i.mean for i in x], spread, color=color, marker=marker, label=arm,
                    capsize=4)  # fmt: skip
    ax.axhline(chance, color="grey", ls=":", label="chance")
    ax.set(xticks=range(4), xticklabels=short.values(), ylim=(0, 1.02), title=title)
left.set(ylabel="validation accuracy")
left.legend(loc="upper left")
words = "Digits: pre-trained rises to 0.64, random stays at chance. Photograph: pre-trained falls."
tl.plots.alt(fig, words)

# %%
print("                       " + "".join(f"{name:>24}" for name in short.values()))
for title, found in (("digit", digit), ("photograph", photo)):
    for arm, scores in found.items():
        row = "".join(f"{mean_interval(scores[layer])!s:>24}" for layer in layers)
        print(f"{title + ', ' + arm:23}{row}")
print(f"digit, from the pixels: {mean_interval(digit_pixels)}")
print(f"photograph, from the mean colour alone: {mean_interval(photo_colour)}")

# %%
top, first = layers[-1], layers[0]


def paired(a, b):
    return mean_interval(np.subtract(a, b))


climbs = paired(digit["pre-trained"][top], digit["pre-trained"][layers[-2]])
learned = paired(digit["pre-trained"][top], digit["random"][top])
forgets = paired(photo["pre-trained"][first], photo["pre-trained"][top])
thrown_away = paired(photo["random"][top], photo["pre-trained"][top])
print(f"digit: last layer minus the one before {climbs}; pre-trained minus random {learned}")
print(f"photograph: first minus last layer {forgets}; random minus pre-trained, last {thrown_away}")
assert climbs.low > 0.08 and learned.low > 0.35
assert forgets.low > 0.15 and thrown_away.low > 0.05

# %% [markdown]
# **Digits.** Only pre-training makes digits readable, and the last layer most. The random network is hardly
# above chance at any depth, so the architecture has no merit of its own here. Note the pixels: they beat
# the stem and stage 0 of the *pre-trained* network, averaged over the image. An average edge says
# little about a digit.
#
# **The photograph.** Everything turns over. The first layer is best, and each further layer loses some;
# the pre-trained network loses more than the random one. In the last layer, *random* weights are ahead by
# 14 points [10, 17], and so is the mean colour of the image, three numbers, by about as much. Pre-training
# was paid for telling letters apart *whatever* lies behind them. What is noise for the source fades on
# the way to its last layer, even where it is the target's whole question.
#
# So "which layer?" has no answer that belongs to the network. It belongs to the network *and* the
# question. The rule of thumb (the more the target asks what the source asked, the later) tells you
# where to look first; a scan, which costs one forward pass per image, tells you where it is.
#
# ## Which pooling?
#
# Guess 3. The last two layers, four poolings, 2 to 50 labels per class.

# %%
counts, places = (2, 10, 50), [(layer, how) for layer in layers[-2:] for how in by_hand]
found = {
    count: Comparison(
        {
            place: [on_val(ridge_probe, labelled(count, seed), place) for seed in range(num_draws)]
            for place in places
        }
    )
    for count in counts
}
for layer, how in places:
    row = "   ".join(str(found[count].interval((layer, how))) for count in counts)
    print(f"{short[layer]}, {how:9} {cache['val'][layer, how].features.shape[1]:5} numbers: {row}")

# %%
curves = {how: [found[count].scores[top, how] for count in counts] for how in by_hand}
ax = tl.plots.plot_learning_curve(counts, curves, chance=0.1, ylabel="validation accuracy")
ax.set(ylim=(0, 1), title="The last layer, pooled in four ways")
words = "Mean, max and both lie on one curve; flatten starts some six points below, ends above."
tl.plots.alt(ax, words)

# %%
for count in counts:
    flat = found[count].difference((top, "flatten"), (top, "mean"))
    both = found[count].difference((top, "mean+max"), (top, "mean"))
    print(f"{count:2} labels: flatten minus mean {flat}; both minus mean {both}")
assert found[2].difference((top, "flatten"), (top, "mean")).high < 0
assert found[50].difference((top, "flatten"), (top, "mean")).low > 0.005
below = layers[-2]
assert found[2].difference((below, "flatten"), (below, "mean")).high < 0
assert found[50].difference((below, "flatten"), (below, "mean")).low > 0.03
assert found[10].difference((below, "mean+max"), (below, "mean")).low > 0.02

# %% [markdown]
# At 2 labels per class flatten loses 6 points, at 50 it wins 3, and at 10 the interval contains zero. It
# is what the tied weights foretold: flatten can say more, and needs labels to find out what. One layer
# below, where a map has 64 places instead of 16, the same happens, stronger.
#
# Mean and max together against mean alone, in the last layer: nothing at any number of labels. A null.
# One layer below, the two together *are* better than the mean, by about six points at ten labels, so that
# is no law either.
#
# ### Do augmented copies help?
#
# The middle way from above: features of the images and of $m$ augmented copies, all kept.

# %%
chance = torch.Generator().manual_seed(0)
copies = []  # of the features of all 700 images
for _ in range(4):
    changed = augment_images(pool_images.inputs, chance)
    loader = BatchLoader(changed, pool_images.targets, 250)
    copies.append(tl.extract_features(backbone, loader).features)


def with_copies(count, seed, m):
    rows = labelled(count, seed)
    H = np.concatenate([pool.features[rows], *(extra[rows] for extra in copies[:m])])
    train = Features(H, np.tile(pool.targets[rows], m + 1))
    return ridge_probe(train, val, val).accuracy


# %%
for count in counts:
    scores = {m: [with_copies(count, seed, m) for seed in range(num_draws)] for m in (0, 1, 4)}
    comparison = Comparison(scores)
    gains = [comparison.difference(m, 0) for m in (1, 4)]
    print(f"{count:2} labels: 1 copy {gains[0]}, 4 copies {gains[1]}")
    assert all(abs(gain.mean) < 0.05 for gain in gains)

# %% [markdown]
# One copy: nothing to speak of at 2 and 10 labels. Four copies, for five times the forward passes: a point
# or two. The intervals are above zero, if barely at few labels. Perhaps there is not much left to teach a
# *head*: the backbone has seen distorted glyphs by the million. (What augmentation does for a backbone
# that is trained on is a matter of lesson 09.)
#
# ## The test set, once
#
# Everything so far was chosen on 300 validation images. Now it is chosen, and the 797 test images
# are read. For each number of labels, the layer and pooling that was best on validation, beside the
# habit (last layer, mean) and the controls.

# %%
chosen = {
    count: max(places, key=lambda place: found[count].interval(place).mean) for count in counts
}
test_loader = everything.loaders(augment=False).test
hows = ("mean", *sorted({how for _, how in chosen.values()} - {"mean"}))
test = extract_layers(backbone, test_loader, layers[-2:], hows)
random_test = [extract_layers(net, test_loader, [top])[top, "mean"] for net in random_nets]
random_parts = digit_tables["random"][top]
pixel_test = tl.extract_features(nn.Flatten(), test_loader)


def probed(parts, test, rows, probe=ridge_probe, **options):
    train, val = parts
    return probe(train.take(rows), test, val, **options).accuracy


# %%
def tested(count, seed):
    """Arm -> test accuracy, for one draw."""
    rows, place, net = labelled(count, seed), chosen[count], seed % len(random_nets)
    k = max((1, 3, 5, 10, 20), key=lambda k: tl.knn(pool.take(rows), val, min(k, len(rows))))
    return {
        "pixels": probed(pixels, pixel_test, rows),
        "random features": probed(random_parts[net], random_test[net], rows),
        "neighbours": tl.knn(pool.take(rows), test[last], min(k, len(rows))),
        "class means": class_means(pool.take(rows), test[last]),
        "ridge": probed((pool, val), test[last], rows),
        "softmax": probed((pool, val), test[last], rows, tl.linear_probe, c_grid=SOFTMAX_GRID),
        "ridge, chosen place": probed(
            [cache[n][place] for n in ("pool", "val")], test[place], rows
        ),
    }

# %% [markdown]
# All arms read the same draws, at each number of labels.

# %%
final = {}
for count in counts:
    draws = [tested(count, seed) for seed in range(num_draws)]
    final[count] = Comparison({arm: [draw[arm] for draw in draws] for arm in draws[0]})
    layer, how = chosen[count]
    print(f"{count} labels per class; chosen on validation: {short[layer]}, {how}")
    for arm in draws[0]:
        gain = final[count].difference(arm, "ridge")
        print(f"    {arm:20} {final[count].interval(arm)}   minus ridge {gain}")

# %%
curves = {arm: [final[count].scores[arm] for count in counts] for arm in final[2].scores}
ax = tl.plots.plot_learning_curve(counts, curves, chance=0.1, ylabel="test accuracy")
ax.set(ylim=(0, 1))
words = (
    "Pixels and random features stay below 0.3; the heads on frozen features lie close together."
)
tl.plots.alt(ax, words)

# %%
for count in counts:
    assert final[count].difference("ridge", "random features").low > 0.2
    assert final[count].difference("ridge", "pixels").low > 0.2
    assert abs(final[count].difference("softmax", "ridge").mean) < 0.04
assert final[50].difference("ridge", "neighbours").low > 0.01
assert final[50].difference("ridge, chosen place", "ridge").low > 0.01

# %% [markdown]
# The test set confirms what validation said. **The features matter**: 30 to 60 points between them and
# the controls. **The head matters less**: at 2 labels all four are within the noise; at 10 neighbours are
# 7 points behind ridge, at 50 neighbours and class means 4 to 5, and softmax is one ahead. **The place**:
# at 2 and 10 labels the pooling that was chosen is not the habit and not measurably better. At 50 it is
# better, by 3 points.
#
# ## Probe against fine-tuning
#
# A probe cannot change the features. Fine-tuning can, and pays: with 300 steps of up to 32 images
# and a backward pass that costs two forward passes, it does the work of up to 28,800 forward passes. The folklore
# says: *few labels, probe; many labels, fine-tune.* Where is the crossing? The numbers are those of
# lesson 01, five paired draws, recorded by `python benchmarks/wild_digits.py`. Each arm read the same
# 300 validation images, to choose $C$, or the learning rate and the step to keep.

# %%
recorded = tl.arms.recorded("wild_digits")
names = ("pixels", "random features", "scratch", "probe", "fine-tune", "probe, then fine-tune")
curves = {name: [recorded[count].scores[name] for count in sorted(recorded)] for name in names}
ax = tl.plots.plot_learning_curve(sorted(recorded), curves, chance=0.1, ylabel="test accuracy")
ax.set(ylim=(0, 1))
words = (
    "Six arms over labels: the probe leads fine-tuning at 2 only in the mean, is behind from 5 on."
)
tl.plots.alt(ax, words)

# %%
print("minus the probe, paired    fine-tune                probe, then fine-tune    scratch")
gaps = {}
for count, comparison in recorded.items():
    gaps[count] = {name: comparison.difference(name, "probe") for name in names[2:]}
    row = "   ".join(
        f"{gaps[count][name]!s:22}" for name in ("fine-tune", "probe, then fine-tune", "scratch")
    )
    print(f"{count:2} labels per class        {row}")
for count in (10, 20, 50):
    assert gaps[count]["fine-tune"].low > 0.08
    assert gaps[count]["probe, then fine-tune"].low > 0.08
assert gaps[5]["probe, then fine-tune"].low > 0.05
assert gaps[10]["scratch"].high < -0.2 and gaps[50]["scratch"].mean > 0

# %% [markdown]
# From 10 labels on, fine-tuning is ahead by some 16 points or more, whichever way its head was started. At 5
# labels it is ahead, too: by 5 points [1, 9] from a random head, by 18 [13, 23] from the probe. At **2**
# labels, fine-tuning from a random head is *behind* by 10 points in the mean, but the interval, [-22, 2],
# contains zero; from the probe it is ahead by 3, [-4, 10], and that contains zero as well.
#
# So what does this say of the crossing? With a random head the mean curves cross between 2 and 5 labels
# per class. That the probe is truly ahead at 2 is not shown. With the head started from the probe, no
# crossing is seen at all.
#
# There is another crossing that is seldom drawn. *Scratch* is far behind the probe at 10 labels and ahead
# of it at 50. Features that may not change have a ceiling; 500 images of one's own come up to it.
#
# Is the open question at 2 labels a matter of one checkpoint? There are two more, pre-trained from other
# seeds. Their fine-tuning is on record; their probes take a second.


# %%
def probes_of(checkpoint, num_draws):
    """Test accuracies of the probe on another checkpoint, at 2 labels per class."""
    network = tl.load_backbone(checkpoint).to(run.device)
    parts = [tl.extract_features(network, loader) for loader in loaders.values()]
    after = tl.extract_features(network, test_loader)
    return [probed(parts, after, labelled(2, i), tl.linear_probe) for i in range(num_draws)]


# %%
best, scores = "probe, then fine-tune", recorded[2].scores
two = {"glyphnet": np.subtract(scores[best], scores["probe"])}  # draw by draw
for seed in (1, 2):
    tuned_scores = scores[f"{best} (seed {seed})"]
    checkpoint = f"glyphnet_seed{seed}"
    two[checkpoint] = np.subtract(tuned_scores, probes_of(checkpoint, len(tuned_scores)))
for checkpoint, difference in two.items():
    print(f"{checkpoint:14} at 2 labels: {mean_interval(difference)}")
averaged = mean_interval(np.mean(list(two.values()), axis=0))
print(f"averaged over the three, by draw: {averaged}")
assert averaged.low > -0.1 and averaged.high < 0.2

# %% [markdown]
# All three means are above zero, all three intervals contain it, and so does that of the average. (The five
# draws of labels are the same for the three, so these are not fifteen independent measurements.) Fine-tuning
# is more likely ahead than not; five draws do not settle it. That is the honest state.
#
# Why would anyone stay with a probe, then? Because twenty forward passes are not twenty thousand. Because
# a hundred tasks can share one frozen backbone and one cache. Because a fit of milliseconds can be
# repeated, cross-validated and understood. And because test images may come from elsewhere than training
# images, where fine-tuned features can be the worse ones (lesson 08).
#
# ## Where it fails
#
# - **The ceiling.** No head gets out of the features what is not in them. Whatever the last
#   layer has lost of the photograph, no head on it brings back.
# - **The layer was chosen with 300 labels.** Validation had more labels than most training sets here.
#   With 20 labelled images in all you would choose by cross-validation, or by leave-one-out, which
#   ridge gives in closed form (`ridge_probe` without `val`), and choose less well.
# - **A friendly source.** Letters over photographs are close to digits over photographs, so the
#   *last* layer won. The further source and target are apart, the more often an earlier layer wins
#   (lesson 07).
# - **A linear head measures what is linearly there.** A layer may hold the answer in a way that a
#   linear head cannot read; then neighbours, or a small network as head, do better.
# - **Ridge scores are not probabilities.** They do add up to one (do you see why?), but a score may be
#   negative. Where a confidence is needed, use softmax on the same features.
#
# ## Explorer
#
# Choose a layer, a pooling and a number of labels. Left: the 300 validation images in the two
# directions in which their features vary most (PCA, which knows no labels). Right: the same images,
# in the two main directions of the ten *scores* that a ridge head gives them. Look for
#
# - a place where the digits are mixed on the left and come apart on the right: the knowledge is
#   there, but not in the largest directions;
# - a place where nothing comes apart however many labels you give;
# - flatten against mean at 2 and at 50 labels.


# %%
def two_directions(H):
    """Coordinates along the two main directions (PCA), (n, 2)."""
    X = H - H.mean(axis=0)
    values, vectors = np.linalg.eigh(X @ X.T)  # (n, n): as in the ridge head, from the examples
    return vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0))


def scatter_digits(ax, points, targets):
    for label in range(10):
        marks = points[targets == label]
        color = tl.plots.palette[label % len(tl.plots.palette)]
        ax.scatter(*marks.T, marker=f"${label}$", color=color, s=28, lw=0.3)
    ax.set(xticks=[], yticks=[])


# %%
def explore_place(layer, pooling, labels):
    train, val = (
        cache["pool"][layer, pooling].take(labelled(labels, 0)),
        cache["val"][layer, pooling],
    )
    probe = ridge_probe(train, val, val)
    fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9, 4))
    scatter_digits(left, two_directions(val.features.astype(np.float64)), val.targets)
    left.set_title(f"{val.features.shape[1]:,} features")
    scatter_digits(right, two_directions(probe.logits(val.features)), val.targets)
    right.set_title(f"ten scores: validation accuracy {probe.accuracy:.2f}")


# %%
tl.widgets.explore(
    explore_place,
    layer=tl.widgets.choice([(short[layer], layer) for layer in layers], top, "layer", drag=True),
    pooling=tl.widgets.choice(list(by_hand), "mean", "pooling"),
    labels=tl.widgets.choice([2, 5, 10, 20, 50], 10, "labels", drag=True),
)

# %% [markdown]
# ## Quiz

# %%
tl.quiz("05")

# %% [markdown]
# ## Exercise
#
# [Exercise 05](../exercises/05_feature_extraction.ipynb): the account, a pooled head written as a
# flattened one, neighbours and ridge by hand, a pipeline with three leaks to mend, and a layer to
# choose.
#
# ## Papers
#
# - Donahue, Jia, Vinyals, Hoffman, Zhang, Tzeng, Darrell 2013, *DeCAF: a deep convolutional activation
#   feature for generic visual recognition*, section 4 (which layer to read), arXiv:1310.1531.
# - Razavian, Azizpour, Sullivan, Carlsson 2014, *CNN features off-the-shelf: an astounding baseline
#   for recognition*, section 3, arXiv:1403.6382.
# - Alain, Bengio 2016, *Understanding intermediate layers using linear classifier probes*, section 3,
#   arXiv:1610.01644.
# - Yosinski, Clune, Bengio, Lipson 2014, *How transferable are features in deep neural networks?*,
#   section 4, arXiv:1411.1792.
# - Kornblith, Shlens, Le 2019, *Do better ImageNet models transfer better?*, section 4 (fixed features
#   against fine-tuning), arXiv:1805.08974.
# - Hastie, Tibshirani, Friedman 2009, *The elements of statistical learning*, sections 3.4.1 (ridge),
#   7.3 (bias and variance of $k$ nearest neighbours) and 7.10.2 (the wrong and the right way to
#   cross-validate).
#
# ## Glossary
#
# | term | meaning | 中文 |
# |---|---|---|
# | feature extraction | to use a frozen network as a fixed description of the input | 特征提取 |
# | forward hook | a call-back with a module's output | 前向钩子 |
# | pooling | one number for each channel out of a map | 池化 |
# | cached features | features computed once and kept | 缓存特征 |
# | linear probe | linear classifier on frozen features | 线性探测 |
# | ridge regression | least squares with an L2 penalty | 岭回归 |
# | closed form | a solution that is computed, not searched for | 闭式解（解析解） |
# | standardising | to bring each feature to mean 0 and deviation 1 | 标准化 |
# | nearest neighbours | the most similar labelled examples | 最近邻 |
# | cosine similarity | inner product of vectors of length one | 余弦相似度 |
# | bias, variance | error that stays on average; error that hangs on the draw | 偏差，方差 |
# | data leak | information from the test set in what is tested | 数据泄漏 |
