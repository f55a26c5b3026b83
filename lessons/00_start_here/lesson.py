# %% [markdown]
# # 00 Start here
#
# Can a network that has never seen a digit help you to read digits? In the next five minutes you
# will see for yourself, on your own machine. On the way you learn how this course works.
#
# **Goals.** When you have worked through it you can
#
# 1. tell whether your machine is ready, and what it will use: CPU or GPU;
# 2. use the four things that every lesson has: a question first, explorers, a quiz, a check;
# 3. say in one sentence what the first transfer result shows, and what it does not.
#
# **Before this:** Python, and what a derivative is. No machine learning library is assumed.
# **Time:** about 20 minutes.
# **Expected result:** from 50 labelled images, a network that was pre-trained on letters and
# symbols reads more than half of 797 new digits. The same network without pre-training reads
# about one in seven.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %% [markdown]
# Click a grey cell and press **Shift + Enter**: the cell runs and the next one is selected. The
# cell above is the same in every lesson. It loads the course's library as `tl`, fixes the random
# seed, and says what it found:
#
# - **device**: `cpu`, or `cuda` if there is a GPU that PyTorch can use;
# - **precision**: how numbers are stored in training, `fp32` on a CPU;
# - **profile**: `tiny` works with data that came with the course and needs no network; `full`, on a
#   GPU, works with larger models. The lessons are the same.
#
# Everything in this course runs in the `tiny` profile on two CPU cores.

# %% [markdown]
# ## 1. Is this machine ready?
#
# The doctor looks at versions, memory, disk and the files that came with the course. Each row that
# is not in order says what to do about it.

# %% tags=["nbval-ignore-output"]
from tlcourse import doctor

for row in doctor.examine():
    print(f"{row.status:5} {row.name:18} {row.remedy}")

# %% [markdown]
# ## 2. The task
#
# *Wild digits* are 1,797 digits that people wrote by hand, each laid in some colour over a patch of
# a photograph. Fifty of them are labelled for you, five of each digit. The test set has 797 others.

# %%
task = tl.load_task("wild_digits", labels_per_class=5, seed=0)
print(f"{len(task.train)} labelled images, {len(task.test)} to be read")

# %%
first = [5 * digit + copy for copy in range(2) for digit in range(10)]  # two of each digit
axes = tl.plots.show_images(task.train.inputs[first], ncols=10)
tl.plots.alt(axes, "Two rows of the digits 0 to 9, in many colours over patches of a flower photo")

# %% [markdown]
# **Before you run anything more.** Guess two numbers and write them down.
#
# 1. A small network, started at random, learns from these 50 images. What fraction of the 797 test
#    images will it read correctly? Chance is 0.10.
# 2. The same network first spent its time on *letters and symbols* such as A, π, ♫ and ⇄. It has
#    never seen a digit. Then it learns from the same 50 images. What fraction now?

# %% [markdown]
# ## 3. From scratch
#
# A **backbone** turns an image into 128 numbers, its *features*. A **head** turns features into ten
# scores, one for each digit. Both start at random, and both learn.

# %%
config = tl.TrainConfig(lr=3e-3, num_steps=120, warmup_steps=10, eval_every_steps=40)
loaders = task.loaders(batch_size=32, augment=True, seed=0)

scratch = tl.Classifier(tl.load_backbone("glyphnet", pretrained=False), num_classes=10)
tl.fit(scratch, loaders.train, loaders.val, config)

# %% [markdown]
# `fit` shows the network 32 images at a time, 120 times, slightly turned and recoloured each time.
# The validation images, other digits again, decide which moment was best. Now the test.

# %%
from_scratch = tl.evaluate(scratch, loaders.test)
print("from scratch:", from_scratch.interval)

# %% [markdown]
# The two numbers behind the accuracy are its **95 % interval**: with other test images of the same
# kind, the accuracy would be expected in this range.
#
# ## 4. With transfer
#
# Now the word that counts changes: `pretrained=True`. The backbone comes with the weights that it had after
# learning to tell letters and symbols apart. We also start the head more cleverly, from a
# *linear probe*; lesson 08 explains why that helps. And a network that is good already takes smaller
# steps (`lr`), and fewer of them.

# %%
transfer = tl.Classifier(tl.load_backbone("glyphnet", pretrained=True), num_classes=10)
plain = task.loaders(batch_size=50, augment=False)
parts = [tl.extract_features(transfer.backbone, part) for part in (plain.train, plain.val)]
tl.linear_probe(parts[0], parts[1]).copy_to(transfer.head)

# %%
config = tl.TrainConfig(lr=1e-3, num_steps=80, warmup_steps=10, eval_every_steps=40)
tl.fit(transfer, loaders.train, loaders.val, config)
with_transfer = tl.evaluate(transfer, loaders.test)
print("with transfer:", with_transfer.interval)

# %%
ax = tl.plots.plot_intervals(
    {"from scratch": from_scratch.interval, "with transfer": with_transfer.interval},
    xlabel="accuracy on 797 test images",
)
ax.axvline(0.1, color="grey", linestyle=":")
tl.plots.alt(ax, "Accuracy with 95 % intervals: transfer far to the right of scratch; chance is 0.1")

# %% [markdown]
# How far off were your two guesses? Most people guess the first too high: fifty images are very
# few for 310,000 weights. The claim of this lesson, as a line of code that would stop with an error
# if it were false:

# %%
assert with_transfer.interval.low > from_scratch.interval.high + 0.2

# %% [markdown]
# What this does **not** show: it was one choice of 50 images, and scratch had only 120 steps and
# one learning rate. Would it catch up if it were tuned, or had more images? A sceptic should ask
# that, and lesson 01 answers it with five choices of images and a tuned opponent.

# %% [markdown]
# ## 5. How the lessons work
#
# **A question first.** Guess before you look. A wrong guess that surprises you is worth more than
# a right answer that you only read.
#
# **Assertions.** A sentence that claims something has an `assert` under it. If the claim were
# false here, on your machine, the lesson would stop at that cell.
#
# **Explorers.** Move the controls and watch. This one shows the test images that the network with
# transfer reads as a digit of your choice; the title of each is what it really is.

# %%
predicted = with_transfer.predictions


def show_read_as(digit, mistakes_only):
    chosen = predicted == digit
    if mistakes_only:
        chosen &= with_transfer.targets != digit
    rows = chosen.nonzero()[0][:16]
    print(f"{chosen.sum()} of {len(predicted)} images read as {digit}")
    if len(rows):
        titles = [int(label) for label in with_transfer.targets[rows]]
        tl.plots.show_images(task.test.inputs[rows], titles, ncols=8)


# %%
tl.widgets.explore(
    show_read_as,
    digit=tl.widgets.slider(0, 9, 1, 4, "read as"),
    mistakes_only=tl.widgets.choice([("all", False), ("mistakes only", True)], False, "show"),
)

# %% [markdown]
# **A quiz** near the end of each lesson. Nothing is recorded; try again as often as you like.

# %%
tl.quiz("00")

# %% [markdown]
# **An exercise** for each lesson, in the folder `exercises`. You write code, and a check under each
# answer tells you at once whether it is right, or on which input it differs. If your teacher grades
# the course, the grade comes from other inputs than those of the check, and one question in each
# exercise is read by a person.
#
# The warm-up: [exercise 00](../exercises/00_start_here.ipynb). Then go on to
# [lesson 01](01_why_transfer.ipynb).

# %% [markdown]
# ## 6. Where it fails
#
# - **No GPU found although there is one?** Run `tlcourse doctor` in a terminal; the row `device`
#   says what is missing.
# - **A kernel that hangs**: menu *Kernel*, *Interrupt*. Training keeps its best weights so far.
# - **Numbers that differ slightly from the printed ones** are normal: another processor or another
#   version rounds differently. Claims are made with a margin for that.
#
# ## Papers
#
# - Pan and Yang 2010, *A Survey on Transfer Learning*, section 2: the definitions that lesson 01
#   builds on. doi:10.1109/TKDE.2009.191.
# - Ganin et al. 2016, *Domain-Adversarial Training of Neural Networks*, section 5.2.4,
#   arXiv:1505.07818: MNIST-M, digits over photo patches, the larger relative of our wild digits.
#
# ## Glossary
#
# | term | meaning | 中文 |
# |---|---|---|
# | backbone | the network that turns an input into features | 骨干网络 |
# | head | the small last part that turns features into scores | 任务头 |
# | feature | one of the numbers by which a network describes an input | 特征 |
# | pre-training | training on another task before | 预训练 |
# | fine-tuning | going on training on the task that counts | 微调 |
# | 95 % interval | range that covers the true value in 95 of 100 such experiments | 95% 置信区间 |
