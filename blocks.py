"""A transformer block by block: what each is given, what reads what, where 1/s can go - proven.

AWQ multiplies the input channels of a Linear by s and divides what it reads by s. This file finds,
without a table of architectures, who made what it reads, and proves that dividing there is right:

    record -> replay        run one block alone, with the arguments that the model gives it
    probe                   a copy of it: which Linears read the same tensor, what ran before them
    candidates -> proof     scale by 1/1024, 1 or 1024, exact in floating point: all that the block
                            makes must come out the same to the last bit

The last section makes Linears of experts that are fused in 3-D parameters. Nothing here knows about
bits: which Linears can be quantized says fits(layer), a function that is handed in and returns the
reason why not, or "". torch alone, but for transformers' Conv1D and fused experts.
"""
import copy
import re
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

# ---- The blocks of a model -----------------------------------------------------------------------


@torch.no_grad()
def find_blocks(model):
    """(name, ModuleList) of the decoder blocks: of the lists that run, that of most parameters."""
    ran = set()
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda m, _: ran.add(m)))
        run_backbone(model, torch.zeros(1, 1, dtype=torch.long))
    lists = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and not ran.isdisjoint(module)]
    if not lists:
        raise ValueError(f"model {type(model).__name__} has no nn.ModuleList of blocks to quantize")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def run_backbone(model, tokens):
    """Run the model on tokens [samples, length], without its lm_head. ValueError if it cannot."""
    try:
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:     # a damaged config, as a top_k above its experts
        raise ValueError(f"{type(model).__name__} does not run: {error}") from error


def linear_of(weight, bias=None):
    """The nn.Linear of a weight [N, K], which is not copied, and a bias [N]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta", bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


@contextmanager
def put_back_if_refused(model):
    """On a ValueError the modules that were replaced meanwhile take their places again."""
    before = dict(model.named_modules())
    try:
        yield
    except ValueError:
        for name, module in before.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        raise


def conv1d_to_linear(model):
    """transformers' Conv1D (GPT-2) stores W^T: turn every one into the nn.Linear that it is."""
    from transformers.pytorch_utils import Conv1D

    for name in [name for name, module in model.named_modules() if isinstance(module, Conv1D)]:
        module = model.get_submodule(name)
        model.set_submodule(name, linear_of(module.weight.data.T.contiguous(), module.bias.data))


def has_matrix(module, K=None):
    """Whether a module has a weight [N, K] to multiply by: Linears, and routers of any class."""
    weight = getattr(module, "weight", None)
    return (isinstance(weight, torch.Tensor) and weight.ndim == 2
            and not isinstance(module, nn.Embedding) and K in (None, weight.shape[1]))


def shared_modules(model):
    """Names of the modules with a parameter that another one (or another name) has too."""
    users = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(parameter, []).append(name.rpartition(".")[0])
    return {name for names in users.values() if len(names) > 1 for name in names}


# ---- Record and replay ---------------------------------------------------------------------------


class Call(NamedTuple):
    """The arguments that a model gave one of its blocks, but for the hidden states."""

    args: tuple
    kwargs: dict
    key: int | str      # where the hidden states go: 0, the first argument, or a keyword

    def run(self, block, hidden):
        """All that the block returns for hidden states."""
        args, kwargs = list(self.args), dict(self.kwargs)
        (args if self.key == 0 else kwargs)[self.key] = hidden
        return block(*args, **kwargs)

    def map(self, function):
        """The same Call with function applied to its tensors."""
        args, kwargs = tree_map_only(torch.Tensor, function, (self.args, self.kwargs))
        return Call(args, kwargs, self.key)


def hidden_of(output):
    """A block's hidden states: blocks return them alone or first in a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def replay(block, call, hidden):
    """The hidden states that the block makes of others, with the other arguments as recorded."""
    return hidden_of(call.run(block, hidden))


def split_call(args, kwargs):
    """(Call, hidden states): the first argument, `hidden_states` or the first tensor among them."""
    # A new container for each block: the model may fill its dicts later.
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x, (args, kwargs))
    if args:
        return Call((None, *args[1:]), kwargs, 0), args[0]
    tensors = (key for key, x in kwargs.items() if isinstance(x, torch.Tensor))
    key = "hidden_states" if "hidden_states" in kwargs else next(tensors)
    return Call((), {**kwargs, key: None}, key), kwargs[key]


class _Stop(Exception):
    """Ends a forward pass of which no more is needed."""


@torch.no_grad()
def first_hidden(model, blocks, tokens):
    """The hidden states that the first block is given for tokens."""
    found = []

    def stop(block, args, kwargs):
        found.append(split_call(args, kwargs)[1])
        raise _Stop

    with blocks[0].register_forward_pre_hook(stop, with_kwargs=True), suppress(_Stop):
        run_backbone(model, tokens)
    return found[0]


@torch.no_grad()
def record(model, blocks, tokens, device=None):
    """([Call of each block], the hidden states that the last one makes) of a run on tokens.

    Every block runs on `device` if given, and goes back. ValueError if a block does not run, or
    runs twice.
    """
    calls, made, device = {}, [], device or model.device

    def before(block, args, kwargs):
        if block in calls:
            raise ValueError(f"block {list(blocks).index(block)} runs more than once in a forward "
                             "pass: shared blocks are not supported")
        block.to(device)
        there = tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))
        calls[block] = split_call(*there)[0]
        # the model's own containers where they will do: a block may fill a dict for a later one
        return there if device != model.device else None

    def after(block, args, output):
        block.to(model.device)
        made.append(hidden_of(output).clone())
        del made[:-1]
        return tree_map_only(torch.Tensor, lambda x: x.to(model.device), output)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(after))
        try:
            run_backbone(model, tokens)
        finally:
            blocks.to(model.device)     # the one that failed, if one did
    missing = [i for i, block in enumerate(blocks) if block not in calls]
    if missing:
        raise ValueError(f"blocks {missing} do not run in a forward pass: not supported")
    return [calls[block] for block in blocks], made[0]


@torch.no_grad()
def check_replay(blocks, calls, hidden, expected):
    """ValueError unless replaying all blocks makes the hidden states that the model itself made.

    On the device of the hidden states and of the calls.
    """
    for index, (block, call) in enumerate(zip(blocks, calls)):
        with moved(block, hidden.device):
            hidden = replay(block, call, hidden)
        if not hidden.isfinite().all():
            raise ValueError(f"the output of block {index} contains NaN or Inf in {hidden.dtype}: "
                             "its weights or activations exceed that range")
    expected = expected.to(hidden)
    error = (hidden - expected).float().norm() / expected.float().norm().clamp(min=1e-30)
    if not error < (1e-4 if hidden.dtype == torch.float32 else 1e-2):
        raise ValueError("the blocks, run one by one, make other hidden states than the model does "
                         f"(by {error:.1e}): a model of this kind is not supported")


@contextmanager
def moved(module, device):
    """The module on another device; afterwards it is back where it was."""
    home = next((p.device for p in module.parameters()), device)        # ReLU has no parameter
    try:
        yield module.to(device)
    finally:
        module.to(home)


def same_arguments(call, other):
    """Whether two Calls have the same leaves: tensors to the last bit, others of the same type."""
    leaves, others = (tree_leaves((c.args, c.kwargs)) for c in (call, other))
    return len(leaves) == len(others) and all(
        x.shape == y.shape and torch.equal(x, y) if isinstance(x, torch.Tensor) else
        type(x) is type(y) for x, y in zip(leaves, others))


# ---- Folds ---------------------------------------------------------------------------------------


class Fold(NamedTuple):
    """How s leaves: a module of the same block whose output channels are divided by s."""

    producer: str           # name of the module within the block, a norm or a Linear
    rows: torch.Tensor      # [K]: the producer's output channel behind each input channel
    offset: float = 0.0     # 1 for a norm that multiplies by 1 + its weight
    power: float = 1.0      # 1/2 for a Linear before a squared ReLU

    @property
    def kind(self):
        """What is divided, in words."""
        return ("root of " * (self.power != 1) + "1 + " * int(self.offset)) + "weight"


class Group(NamedTuple):
    """The Linears of a block that read the same tensor, or rows of it: they share s."""

    layers: tuple           # names within the block
    reader: str             # the module that is first given the whole tensor
    kept: tuple = ()        # what reads it too and stays in full precision (routers): times s
    fold: Fold | None = None
    reason: str = ""        # why there is no fold


@torch.no_grad()
def divide_output(block, fold, s):
    """Divide the output channels of the fold's producer by s [K] (equal where rows are). In place.

    (offset + weight) / s^power - offset, computed in float32 and stored in the weight's dtype.
    """
    producer = block.get_submodule(fold.producer)
    weight, bias = producer.weight, getattr(producer, "bias", None)
    factor = torch.ones(len(weight), dtype=torch.float32, device=s.device)
    factor[fold.rows.to(s.device)] = s.sqrt() if fold.power == 0.5 else s
    column = factor.view(-1, *[1] * (weight.ndim - 1))
    weight.copy_((weight.float() + fold.offset) / column - fold.offset)
    if bias is not None:
        bias.copy_(bias.float() / factor)


@torch.no_grad()
def multiply_inputs(block, names, s):
    """W diag(s) in place of the weights of Linears. In place."""
    for name in names:
        weight = block.get_submodule(name).weight
        weight.copy_(weight.float() * s)


# ---- Probe: a copy of a block to try things on, and what reads what in it ------------------------


def probe_copy(block):
    """A float32 copy of the block with random weights, its norm gains multiples of 1/16.

    Whether a fold is right depends on the block's structure, not on its weights (they may be 0);
    with these gains (1 + gain) / p - 1 is exact for p = 1024 or 1/1024 (see folds_are_exact).
    """
    generator = torch.Generator().manual_seed(0)

    def random(name, p):
        x = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        if p.ndim > 1:
            x *= p.shape[-1] ** -0.5
        elif name.endswith("weight"):
            x = torch.randint(4, 13, p.shape, generator=generator).float() / 16
        else:                           # small: a router's may keep an expert from being chosen
            x *= 0.1
        return nn.Parameter(x.to(p.device), requires_grad=False)

    weights = {id(p): random(name, p) for name, p in block.named_parameters()}
    return copy.deepcopy(block, weights).float()        # which takes these for copied already


class Probe(TorchFunctionMode):
    """A copy of a block, which has run on random hidden states until every Linear was reached.

    In every turn on others, and with the choice of experts moved on: see turn_experts.
    """

    def __init__(self, block, call, hidden):
        super().__init__()
        self.block = probe_copy(block)
        self.call = call.map(lambda x: x.float() if x.is_floating_point() else x)
        self.hidden = {}        # {turn: hidden states}, several where one misses some experts
        self.rows = {}          # {module: hashes of all rows it was given}, in the order they ran
        self.readers = set()    # modules that multiply what they are given by their weight
        self.twice = set()      # modules that ran more than once in a run
        self.routers = set()    # readers by whose output experts are chosen
        self.last = ("", 0, 0)  # the latest reader, its outputs, elements of them all
        turn_experts(self)
        linears = {name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        for turn in range(32):
            reached = len(self.rows)
            self.hidden[turn] = torch.randn(
                hidden.shape, generator=torch.Generator().manual_seed(turn), dtype=torch.float32
            ).to(hidden.device)
            self.trace(turn)
            if len(self.rows) == reached:       # nothing new
                del self.hidden[turn]
            if self.rows.keys() >= linears:
                break

    def run(self, turn):
        """All tensors that the block makes of hidden[turn], and what it leaves in its arguments."""
        self.turn = turn
        made = self.call.run(self.block, self.hidden[turn])
        leaves = tree_leaves((made, self.call.kwargs))
        return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def trace(self, turn):
        """Run, and note what each module is given."""
        names = {module: name for name, module in self.block.named_modules() if name}
        ran = set()

        def before(module, args, kwargs):
            x, name = (*args, *kwargs.values(), None)[0], names[module]
            if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim and x.numel()):
                return              # an expert without a token has not been reached
            self.twice |= ran & {name}
            ran.add(name)
            x = x.reshape(-1, x.shape[-1])                                  # [T, K]
            self.rows.setdefault(name, set()).update(
                hash(row.tobytes()) for row in x.float().cpu().numpy())
            if isinstance(module, nn.Linear) or has_matrix(module, x.shape[1]):
                self.readers.add(name)
                self.last = (name, len(module.weight), len(x) * len(module.weight))

        with ExitStack() as hooks:
            for module in names:
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(self)
            self.run(turn)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """A router is the latest reader when the block chooses among as many outputs."""
        if getattr(function, "__name__", "") in ("topk", "argmax", "max", "sort"):
            x = args[0] if args else kwargs["input"]
            if x.ndim and (x.shape[-1], x.numel()) == self.last[1:]:
                self.routers.add(self.last[0])
        return function(*args, **(kwargs or {}))

    def sources(self):
        """{who was first given a tensor: the readers that were given it, or rows of it}."""
        found = {}
        for name, rows in self.rows.items():
            first = next((first for first in found if self.rows[first] >= rows
                          and first not in self.twice), name)
            found.setdefault(first, []).extend([name] * (name in self.readers))
        return {first: readers for first, readers in found.items() if readers}


# ---- Candidates and their proof ------------------------------------------------------------------


def folds_are_exact(probe, folds, multiplied):
    """Prove folds: scale by 1/1024, 1 or 1024, which is exact, and compare to the last bit.

    folds: one, or one for each of several experts; multiplied: names of their readers, for each.
    True if what the block makes changes when only the producers are divided, and is bitwise the
    first again when the columns of their readers are multiplied. A residual that also reads the
    norm fails here, and so does a GELU on the way, or a clamp, at which 1024 arrives. The block is
    left as it was.
    """
    generator = torch.Generator().manual_seed(1)
    # 1024 has a square root among the powers of two.
    scales = [(1024.0 ** torch.randint(-1, 2, (int(fold.rows.max()) + 1,), generator=generator)
               .float())[fold.rows].to(next(probe.block.parameters()).device) for fold in folds]

    def scale(function, targets, sign):
        for target, s in zip(targets, scales):
            function(probe.block, target, s ** sign)

    def unchanged():
        return all(len(made := probe.run(turn)) == len(first) and all(map(torch.equal, made, first))
                   for turn, first in expected.items())

    expected = {turn: probe.run(turn) for turn in probe.hidden}
    scale(divide_output, folds, 1)
    has_effect = not unchanged()
    scale(multiply_inputs, multiplied, 1)
    exact = has_effect and unchanged()
    scale(multiply_inputs, multiplied, -1)
    scale(divide_output, folds, -1)
    return exact


def is_plain(layer):
    """Whether a Linear of a probe_copy computes x W^T + b, whatever its class calls itself.

    Falcon's own class does; DeepSeek-V4's, one matrix for each group of heads, does not.
    """
    if type(layer).forward is nn.Linear.forward and "forward" not in vars(layer):
        return True
    x = torch.randn(1, 2, layer.in_features, generator=torch.Generator().manual_seed(2),
                    dtype=torch.float32)
    x = torch.cat([x, 1024 * x], 1).to(layer.weight.device)             # a clamp shows at 1024
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    try:
        found = layer(x)
    except Exception:       # its code may want anything else: then it is no Linear
        return False
    return (isinstance(found, torch.Tensor) and found.shape == expected.shape
            and bool(((found - expected).norm(dim=-1) <= 1e-4 * expected.norm(dim=-1)).all()))


def trace_rows(probe, producer, layer, first, count):
    """Which of `count` rows of the producer, from `first`, makes each input channel of layer: [K].

    The first token attends only to itself, so there attention hands v through unchanged, whatever q
    and k are. With output channel first + r of the producer multiplied by r + 1, each input channel
    of layer is multiplied by the number of the row that makes it. None if some factor is no such
    number; that the rows are right, folds_are_exact proves.
    """
    producer, layer = map(probe.block.get_submodule, (producer, layer))
    factor = torch.ones(producer.out_features, dtype=torch.float32, device=producer.weight.device)
    factor[first:first + count] = torch.arange(1, count + 1, dtype=torch.float32)

    def first_input(factor):
        seen = []
        with ExitStack() as hooks:
            hooks.enter_context(layer.register_forward_pre_hook(
                lambda _, args, kwargs: seen.extend((*args, *kwargs.values())[0].flatten(0, -2)),
                with_kwargs=True))
            hooks.enter_context(producer.register_forward_hook(
                lambda _, args, output: output * factor))
            for turn in probe.hidden:
                probe.run(turn)
        # [K]; a factor before a router may keep all tokens from an expert
        return seen[0] if seen else torch.tensor(torch.nan)

    number = (first_input(factor) / first_input(torch.ones_like(factor))).round()
    if not ((number >= 1) & (number <= count)).all():
        return None
    return first - 1 + number.long().cpu()


def candidate_folds(probe, earlier, layer):
    """Possible folds for what a layer reads, from the modules that ran before it."""
    K = probe.block.get_submodule(layer).weight.shape[1]
    for name in earlier:
        producer = probe.block.get_submodule(name)
        gain = getattr(producer, "weight", None)
        if isinstance(producer, nn.Linear) and is_plain(producer):
            R = producer.out_features
            if R == K:
                yield Fold(name, torch.arange(K))
                yield Fold(name, torch.arange(K), power=0.5)
                continue
            # any rows: v repeated for several heads; the last or first K: v after q and k, or up
            # beside its gate, of which all would be more than what is linear
            for first, count in [(0, R)] + [(R - K, K), (0, K)] * (R > K):
                rows = trace_rows(probe, name, layer, first, count)
                if rows is not None:
                    yield Fold(name, rows)
        elif isinstance(gain, torch.Tensor) and gain.ndim == 1 and K % len(gain) == 0:
            rows = torch.arange(K) % len(gain)      # shorter than K: one gain for all heads
            yield Fold(name, rows)
            yield Fold(name, rows, offset=1.0)


# ---- The plan ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What of a model is quantized, and where 1/s goes."""

    prefix: str             # name of the list of blocks in the model
    blocks: nn.ModuleList
    groups: list            # [[Group, ...] of each block], in the order they run
    skipped: dict           # {full name of a Linear that stays: reason}
    calls: list             # [Call of each block] on a few tokens,
    hidden: torch.Tensor    # [1, length, H], the first block's hidden states of these tokens


@torch.no_grad()
def plan_model(model, tokens, fits):
    """The Plan of a model: every block's structure is planned once. ValueError if nothing fits."""
    conv1d_to_linear(model)
    prefix, blocks = find_blocks(model)
    few = tokens[:1, :31]       # no layer has 31 outputs: no choice among tokens looks a router's
    calls, expected = record(model, blocks, few)
    hidden = first_hidden(model, blocks, few)
    check_replay(blocks, calls, hidden, expected)
    others, _ = record(model, blocks, tokens[-1:, :31].flip(1))     # all may begin alike
    if not all(map(same_arguments, calls, others)):
        raise ValueError(f"{type(model).__name__} gives its blocks arguments that depend on the "
                         "text, not only on its length: not supported")
    groups, skipped, known = [], unfuse_experts(model, prefix, fits), {}
    elsewhere = shared_modules(model)
    for index, (block, call) in enumerate(zip(blocks, calls)):
        path = f"{prefix}.{index}."
        shared = {name.removeprefix(path) for name in elsewhere if name.startswith(path)}
        structure = repr((block, [tuple(p.shape) for p in block.parameters()], sorted(shared)))
        if structure not in known:
            known[structure] = plan_block(block, call, hidden, fits, shared)
        groups.append(known[structure][0])
        skipped.update({path + name: why for name, why in known[structure][1].items()})
    if not any(groups):
        reasons = "; ".join(sorted(set(skipped.values()))) or "there is no nn.Linear"
        raise ValueError(f"no layer of {type(model).__name__} can be quantized: {reasons}")
    skipped.update({name: "outside the decoder blocks" for name, module in model.named_modules()
                    if has_matrix(module) and not name.startswith(prefix + ".")})
    return Plan(prefix, blocks, groups, skipped, calls, hidden)


def plan_block(block, call, hidden, fits, shared=frozenset()):
    """([Group, ...] in the order they run, {name of what stays: reason}) of a block.

    shared: names of modules whose parameters serve elsewhere in the model too.
    """
    probe = Probe(block, call, hidden)
    families, skipped = {}, {name: "not reached when the block ran"
                             for name, module in block.named_modules()
                             if isinstance(module, nn.Linear) and name not in probe.rows}
    for first, readers in probe.sources().items():
        reasons = reasons_to_stay(probe, readers, shared, fits)
        skipped.update(reasons)
        layers = tuple(name for name in readers if name not in reasons)
        if layers:
            # One expert's group is like another's: they are proven together.
            shapes = [probe.block.get_submodule(name).weight.shape for name in readers]
            alike = re.sub(r"\b\d+\b", "#", str(readers)), str(shapes)
            families.setdefault(alike, []).append(Group(layers, first, tuple(reasons)))
    groups = [group for family in families.values() for group in plan_folds(probe, family, shared)]
    order = list(probe.rows)
    return sorted(groups, key=lambda group: min(map(order.index, group.layers))), skipped


def plan_folds(probe, family, shared):
    """The groups of a family, all with the same fold, the first that is proven, or with none."""
    multiplied, tried = [group.layers + group.kept for group in family], []
    K = probe.block.get_submodule(multiplied[0][0]).weight.shape[1]
    for name in sum((group.kept for group in family), ()):
        if name in shared | probe.twice or probe.block.get_submodule(name).weight.shape[1] != K:
            reason = f"{name} reads the same tensor and is left alone"
            return [group._replace(reason=reason) for group in family]
    order = list(probe.rows)
    earlier = order[:min(map(order.index, multiplied[0]))][::-1]       # nearest first
    for fold in candidate_folds(probe, earlier, multiplied[0][0]):
        producers = [counterpart(fold.producer, multiplied[0][0], names[0]) for names in multiplied]
        if len(set(producers)) == len(family) and shared.isdisjoint(producers) and \
                probe.rows.keys() >= set(producers):
            folds = [fold._replace(producer=name) for name in producers]
            if folds_are_exact(probe, folds, multiplied):
                return [group._replace(fold=fold) for group, fold in zip(family, folds)]
            tried.append(fold.producer)
    if len(family) > 1 and not tried:       # numbered alike, but no experts
        return [group for one in family for group in plan_folds(probe, [one], shared)]
    names = ", ".join(dict.fromkeys(tried)) or "no norm or Linear of this width runs before"
    return [group._replace(reason="no producer whose scaling leaves the block's output unchanged; "
                           f"tried: {names}") for group in family]


def counterpart(name, own, other):
    """What is to the expert of `other` what `name` is to that of `own`: experts.3.up for .0.up."""
    numbers = list(zip(own.split("."), other.split(".")))
    parts = name.split(".")
    return ".".join([b if part == a else part for part, (a, b) in zip(parts, numbers)]
                    + parts[len(numbers):])


def reasons_to_stay(probe, readers, shared, fits):
    """{name: reason} for those of the readers of a tensor that must stay as they are."""
    def reason(name):
        layer = probe.block.get_submodule(name)
        if name in probe.routers:
            return "a router: experts are chosen by its output"
        if name in shared:
            return "its weight is shared with another module"
        if name in probe.twice:
            return "used more than once in the block"
        if not isinstance(layer, nn.Linear):
            return f"a {type(layer).__name__}, which is no nn.Linear"
        if not is_plain(layer):
            return f"a {type(layer).__name__}, which is not a product with its weight"
        return fits(layer)

    reasons = {name: why for name in readers if (why := reason(name))}
    # Readers of a checkpoint fuse q, k and v, gate and up: of one module's Linears, all or none.
    parents = {name.rpartition(".")[0] for name in reasons if name not in probe.routers
               and isinstance(probe.block.get_submodule(name), nn.Linear)}
    return {name: reasons.get(name, "shares its input with a layer that cannot be quantized")
            for name in readers if name in reasons or name.rpartition(".")[0] in parents}


# ---- Fused experts -------------------------------------------------------------------------------

# transformers 5 keeps the weights of all experts of a block in 3-D parameters. Its decorator
# use_experts_implementation leaves on the module how they lie, and runs the function that the
# module's config names:
FLAGS = ("config", "num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")


def experts_of(model, fused=True):
    """{name: module} of the modules with experts in 3-D parameters; those unfused if not fused."""
    return {name: module for name, module in model.named_modules()
            if all(hasattr(module, flag) for flag in FLAGS)
            and hasattr(module, "down_proj") == fused}


def expert_linears(fused, e):
    """The nn.Linears of expert e, views of the 3-D parameters: of gate, up and down."""
    def part(name, rows=slice(None)):
        W = getattr(fused, name)[e]
        bias = getattr(fused, name + "_bias")[e][rows].clone() if fused.has_bias else None
        return linear_of((W.T if fused.is_transposed else W)[rows], bias)   # [N, K]

    if not fused.has_gate:
        return [part("up_proj"), part("down_proj")]
    half = fused.gate_up_proj.shape[2 if fused.is_transposed else 1] // 2
    rows = [slice(0, half), slice(half, None)] if fused.is_concatenated else \
        [slice(0, None, 2), slice(1, None, 2)]
    return [*(part("gate_up_proj", r) for r in rows), part("down_proj")]


def run_experts(fused, hidden_states, top_k_index, top_k_weights):
    """The sum over the experts chosen for a token, weighted: only the chosen ones are touched."""
    output = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)         # [T, K]
    for e in top_k_index.unique().tolist():
        if e < fused.num_experts:       # one more stands for none at all
            token, place = (top_k_index == e).nonzero(as_tuple=True)
            made = run_expert(fused, fused.get_submodule(str(e)), hidden_states[token])
            made = made * top_k_weights[token, place, None]
            output.index_add_(0, token, made.to(output.dtype))
    return output.to(hidden_states.dtype)


def run_expert(fused, expert, x):
    """down(gate(x) * up(x)), with whatever the fused module puts between its products."""
    *inner, down = expert.values()
    made = [layer(x) for layer in inner]
    if not fused.has_gate:
        made = fused.act_fn(made[0])
    elif fused.is_concatenated:
        made = fused._apply_gate(torch.cat(made, -1))
    else:
        made = fused._apply_gate(torch.stack(made, -1).flatten(-2))
    made = down(made)
    return fused.post_expert_norm(made) if fused.has_post_expert_norm else made


def turn_experts(probe):
    """Experts chosen k at a time are turned by k places a turn, so that each has its own.

    What a router chooses still counts, but none is left out because of its router's biases.
    """
    def choose(fused, args):
        index = args[1]
        return args[0], (index + probe.turn * index.shape[-1]) % fused.num_experts, *args[2:]

    for fused in experts_of(probe.block, fused=False).values():
        fused.register_forward_pre_hook(choose)


def projection_names(model, name):
    """What the hub's checkpoints call the projections of an expert: gate, up (or up alone), down.

    Asked of transformers: small tensors of numbers are converted as it would save the weights.
    """
    from transformers.core_model_loading import revert_weight_conversion

    fused = model.get_submodule(name)
    names = ["gate_proj", "up_proj", "down_proj"][not fused.has_gate:]
    # [experts, projections, 1]; projection i of expert 0 has the number i
    numbers = torch.arange(len(names) * fused.num_experts, device="cpu").view(-1, len(names), 1)
    saved = revert_weight_conversion(model, {
        f"{name}.gate_up_proj" if fused.has_gate else f"{name}.up_proj": numbers[:, :-1].clone(),
        f"{name}.down_proj": numbers[:, -1:].clone()})
    found = {}
    for key, tensor in saved.items():
        *_, e, projection, suffix = ["", "", *key.split(".")]
        if (e, suffix) == ("0", "weight") and tensor.numel() == 1:
            found[int(tensor)] = projection
    return [found.get(i, name) for i, name in enumerate(names)]


def unfused(model, name):
    """The module of that name with nn.Linears in the place of 3-D parameters: 3.down_proj.

    They are views: nothing is copied, and the memory is free when the last of them is replaced.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("unfused", run_experts)
    fused, names = model.get_submodule(name), projection_names(model, name)
    made = copy.copy(fused)
    made._modules = dict(fused._modules)
    made._parameters = {key: p for key, p in fused._parameters.items()
                        if not re.fullmatch(r"(gate_up|up|down)_proj(_bias)?", key)}
    for e in range(fused.num_experts):
        made.add_module(str(e), nn.ModuleDict(dict(zip(names, expert_linears(fused, e)))))
    made.config = copy.copy(fused.config)       # its own: others may stay fused
    made.config._experts_implementation_internal = "unfused"
    return made


def stack_size(module):
    """Elements of the 3-D parameters [experts, rows, columns] that a module itself has."""
    return 0 if isinstance(module, (nn.Linear, nn.Conv1d)) else sum(
        p.numel() for p in module.parameters(recurse=False)
        if p.ndim == 3 and min(p.shape[1:]) > 1)        # RWKV's [1, 1, H] is none


@torch.no_grad()
def unfuse_experts(model, prefix, fits):
    """Unfuse the experts of the blocks where that makes the same outputs; {name: reason} of others.

    All or none of a module's experts: a checkpoint holds them one by one or fused.
    """
    size, reasons, known = sum(p.numel() for p in model.parameters()), {}, experts_of(model)
    for name, module in list(model.named_modules()):
        if name.startswith(prefix + ".") and stack_size(module):
            reason = (unfuse_or_why(model, name, fits) if name in known else
                      "3-D parameters of a kind that is not known")
            if reason:
                reasons[name] = (f"{stack_size(module) / size:.0%} of the model in full precision: "
                                 + reason)
    return reasons


def unfuse_or_why(model, name, fits):
    """Unfuse one module, or the reason why not."""
    fused = model.get_submodule(name)
    reason = next(filter(None, map(fits, expert_linears(fused, 0))), "")
    if reason:
        return f"fused experts: {reason}"
    # Tokens that reach every expert, small and large because some clamp.
    E, W = fused.num_experts, expert_linears(fused, 0)[0].weight
    chosen = (torch.arange(E)[:, None] + torch.arange(min(E, 2))) % E
    X, weights = (torch.randn(E, n, generator=torch.Generator().manual_seed(0),
                              dtype=torch.float32) for n in (W.shape[1], chosen.shape[1]))
    X *= 4 ** (torch.arange(E) % 4)[:, None]
    made, inputs = unfused(model, name), (X.to(W), chosen.to(W.device), weights.to(W))
    expected = fused(*inputs)
    size = expected.float().norm(dim=-1).clamp(min=1e-30)
    error = (made(*inputs) - expected).float().norm(dim=-1) / size
    if not error.max() < (1e-4 if expected.dtype == torch.float32 else 3e-2):
        return "fused experts that make other outputs when they are run one by one"
    model.set_submodule(name, made)
    return ""
