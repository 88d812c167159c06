"""Checkpoints: quantized models saved and loaded in the AWQ "GEMM" format; full-precision sources.

For a Linear with N outputs and K inputs, 4 bits, groups of G (what vLLM, SGLang, transformers and
AutoAWQ read and write):

    NAME.qweight [K, N/8] int32    NAME.qzeros [K/G, N/8] int32    NAME.scales [K/G, N] float16
    config.json: "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": G,
        "zero_point": true, "version": "gemm", "modules_to_not_convert": [full module paths]}

2, 3 and 8 bits have no place in it: they are saved as version "dense", which other readers refuse.
After register() transformers' own from_pretrained reads both. Most of what is damaged safetensors
and transformers refuse; here that becomes one ValueError, which names the folder.
"""
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (PrefixChange, WeightRenaming, apply_renamings,
                                             rename_source_key)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import GgufConfig, QuantizationConfigMixin

import blocks
from kernel import DTYPES, AWQLinear, packed_width


def checkpoint_config(bits, group_size, skipped):
    """The quantization_config of config.json; skipped: names of the modules that stay."""
    return {"quant_method": "awq", "bits": bits, "group_size": group_size, "zero_point": True,
            "version": "gemm" if bits == 4 else "dense", "modules_to_not_convert": sorted(skipped)}


def hub_names(model, names):
    """The names that modules have in the hub's checkpoints of this type and in what is saved."""
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:           # not loaded: save_pretrained takes the type's own, but prefixes
        rules = [rule for rule in get_model_conversion_mapping(model, add_legacy=False)
                 if not isinstance(rule, PrefixChange)]
    rules = [rule.reverse_transform() for rule in rules[::-1] if isinstance(rule, WeightRenaming)]
    names = (name.replace("_orig_mod.", "") for name in names)      # of a compiled module
    return sorted(apply_renamings(f"{name}.weight", rules).removesuffix(".weight")
                  for name in names)


class AwqConfig(QuantizationConfigMixin):
    """The quantization_config as transformers wants it; ValueError unless it is one of these."""

    def __init__(self, **config):
        bits, size, zero_point = (config.get("bits"), config.get("group_size"),
                                  config.get("zero_point", True))
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        known = (type(bits) is type(size) is int and bits in (2, 3, 4, 8) and zero_point is True
                 and version == ("gemm" if bits == 4 else "dense") and (size == -1 or size > 0))
        if not known or config.get("backend") == "llm-awq":
            raise ValueError(f"bits is {bits!r}, group_size {size!r}, version {version!r} and "
                             f"zero_point {zero_point!r}: they must be 4 with 'gemm' or 2, 3 or 8 "
                             "with 'dense', -1 or positive, and True; backend must not be llm-awq")
        self.__dict__ |= checkpoint_config(bits, size, config.get("modules_to_not_convert") or ())


# ---- Load, through transformers ------------------------------------------------------------------


class AwqQuantizer(HfQuantizer):
    """Puts an AWQLinear where the files hold packed words; transformers then fills it."""

    requires_calibration, is_trainable = True, False

    def is_serializable(self):
        return True

    def update_dtype(self, dtype):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}: it must be one of {DTYPES}")
        return dtype

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        blocks.conv1d_to_linear(model)
        packed = packed_layers(model, checkpoint_files)
        for name in blocks.experts_of(model):
            if any(layer.startswith(name + ".") for layer in packed):
                model.set_submodule(name, made := blocks.unfused(model, name))
                made._is_hf_initialized = True      # it has no parameters left to initialize
        modules = dict(model.named_modules())
        for name, stored in packed.items():
            layer = empty_layer(name, modules.get(name), config.bits, config.group_size)
            expected = {key: (dtype, list(getattr(layer, key).shape))
                        for key, dtype in PACKED.items()}
            if stored != expected:      # else transformers would fill it with what is not there
                raise ValueError(f"the tensors of {name} are {stored}: they must be {expected}")
            model.set_submodule(name, layer)
        # in full paths, whatever the checkpoint said: what a later save_pretrained writes
        config.modules_to_not_convert = hub_names(model, [
            name for name, module in model.named_modules() if not isinstance(module, AWQLinear)
            and (blocks.has_matrix(module) or blocks.stack_size(module))])
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, AWQLinear) and not module.scales.is_meta:
                if not module.scales.isfinite().all():
                    raise ValueError(f"tensor {name}.scales contains NaN or Inf")
                module.prepare()        # now, because a compiled forward cannot do it
        return model


PACKED = {"qweight": "I32", "qzeros": "I32", "scales": "F16"}


def packed_layers(model, files):
    """{layer, as the model calls it: {tensor: (dtype, shape)}} of what the files hold packed."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError("an AWQ checkpoint is read from safetensors files only")
    stored = {}
    for tensors in (safe_open(file, framework="pt") for file in files):
        for layer, _, key in (name.rpartition(".") for name in tensors.keys()):
            if key in PACKED:
                entry = tensors.get_slice(f"{layer}.{key}")
                stored.setdefault(layer, {})[key] = entry.get_dtype(), entry.get_shape()
    renamings = [rule for rule in get_model_conversion_mapping(model)
                 if isinstance(rule, WeightRenaming)]
    packed, own = {}, model.state_dict()
    for layer in (layer for layer in stored if "qweight" in stored[layer]):
        name = rename_source_key(f"{layer}.qweight", renamings, [])[0]
        weight = name.removesuffix("qweight") + "weight"        # by which its prefix is found
        name = rename_source_key(weight, [], [], model.base_model_prefix, own)[0]
        packed[name.removesuffix(".weight")] = stored[layer]
    if not packed:
        raise ValueError("no tensor is called *.qweight, though the config says quant_method awq")
    return packed


def empty_layer(name, linear, bits, group_size):
    """An AWQLinear without memory for a Linear."""
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name} is packed, but the model has no nn.Linear of that name")
    N, K = linear.out_features, linear.in_features
    words, groups = packed_width(N, bits), 1 if group_size == -1 else K // group_size
    with torch.device("meta"):
        return AWQLinear(torch.empty(K, words, dtype=torch.int32),
                         torch.empty(groups, words, dtype=torch.int32),
                         torch.empty(groups, N, dtype=torch.float16),
                         None if linear.bias is None else linear.bias.data, bits)


def register():
    """Let transformers' own from_pretrained read AWQ checkpoints, with nothing else installed."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["awq"] = AwqConfig
    auto.AUTO_QUANTIZER_MAPPING["awq"] = AwqQuantizer


def load_whole(name, problems, **kwargs):
    """AutoModelForCausalLM.from_pretrained, whole or not at all: ValueError that names the model.

    problems: the kinds of keys, of transformers' loading info, that must not be.
    """
    register()
    where, options = place_of(name)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    kwargs = {"dtype": "auto", "trust_remote_code": False, **options, **kwargs}
    if type(kwargs["trust_remote_code"]) is not bool:
        raise ValueError(f"trust_remote_code is {kwargs['trust_remote_code']!r}: it must be a bool")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:      # of any kind: the libraries below do not say what they raise
        raise ValueError(f"model {name} cannot be loaded: {reason(name, error)}") from error
    for problem in problems:
        keys = sorted(map(str, info[f"{problem}_keys"]))
        if keys:
            raise ValueError(f"model {name} has {problem} tensors: {', '.join(keys[:5])}")
    model.config.name_or_path = str(name)
    return model


def place_of(name):
    """Where transformers finds a model or tokenizer, and the options for it, if a .gguf file."""
    path = Path(name)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    return (path.parent, {"gguf_file": path.name}) if is_gguf else (name, {})


def reason(name, error):
    """Why a model could not be loaded, in a line: the library's, unless it would mislead."""
    path, said = Path(name), " ".join(str(error).split())
    if not path.exists() and isinstance(error, OSError):
        return "no such folder, and the hub has no such model or cannot be reached"
    if path.suffix == ".gguf" and not isinstance(error, ImportError):
        return f"it is truncated, or of a kind that transformers does not read: {said}"
    if path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if ggufs:
            return f"it is a folder: name one of its .gguf files: {', '.join(ggufs)}"
        if (path / "adapter_config.json").exists():
            return "it is an adapter: merge it into its model first (merge_and_unload())"
    if "Unrecognized configuration class" in said:      # 180 others are named there
        return "it is not a causal LM: a decoder-only model is needed"
    return said if " " in said else repr(error)         # a KeyError says nothing but the key


def load_quantized(folder, **kwargs):
    """The model that save_quantized (or AutoAWQ) wrote, as transformers loads it: the same tensors.

    folder: a folder or hub name. kwargs go to AutoModelForCausalLM.from_pretrained. ValueError for
    a checkpoint that is not AWQ's, or with missing, truncated or foreign tensors.
    """
    model = load_whole(folder, ("missing", "mismatched", "unexpected"), **kwargs)
    if not any(isinstance(module, AWQLinear) for module in model.modules()):
        raise ValueError(f"model {folder} has no quantization_config: it is not quantized")
    return model


# ---- Save ----------------------------------------------------------------------------------------


def check_target(folder):
    """The nearest folder above it that exists.

    ValueError unless folder is absent or empty, OSError unless files can be put there.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder == Path.cwd()):
        raise ValueError(f"folder {folder} is a non-empty folder, a file or the current folder: "
                         "it must not exist, or be empty and elsewhere")
    nearest = next(parent for parent in folder.parents if parent.exists())
    tempfile.TemporaryDirectory(dir=nearest, prefix=f".{folder.name}.").cleanup()
    return nearest


def save_quantized(model, folder, tokenizer=None, shard_size="5GB", calibration=None):
    """Write the quantized model (and tokenizer) to folder, config and safetensors, or nothing.

    calibration: text for the model card (README.md), for instance "pileval, 128 x 512 tokens".
    ValueError if the folder is taken or the model is not quantized; OSError if the disk is full or
    another process has filled the folder meanwhile.
    """
    folder = Path(folder).resolve()
    nearest = check_target(folder)
    names = [name for name, m in model.named_modules() if isinstance(m, AWQLinear)]
    if not names or getattr(model.config, "quantization_config", None) is None:
        raise ValueError("model is not quantized, or in part only: call quantize_model first")
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise ValueError(f"tokenizer is {tokenizer!r}: it must be a tokenizer or None")
    forget_source(model)
    with tempfile.TemporaryDirectory(dir=nearest, prefix=f".{folder.name}.") as beside:
        written = Path(beside, folder.name)
        try:
            model.save_pretrained(written, max_shard_size=shard_size)
        except SafetensorError as error:
            raise OSError(f"folder {folder} cannot be written: {error}") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        (written / "README.md").write_text(model_card(model, folder.name, calibration), "utf-8")
        stored = sum(name.endswith(".qweight") for file in written.glob("*.safetensors")
                     for name in safe_open(file, framework="pt").keys())
        if stored != len(names):
            raise ValueError(f"of {len(names)} packed layers only {stored} were written")
        folder.parent.mkdir(parents=True, exist_ok=True)
        written.rename(folder)


def forget_source(model):
    """Plain weights that were read from FP8 or GGUF files are not to be saved as such again."""
    if not isinstance(getattr(model, "hf_quantizer", None), AwqQuantizer | None):
        del model.hf_quantizer
    if any(hasattr(operation, "hf_quantizer")
           for conversion in getattr(model, "_weight_conversions", None) or ()
           for operation in getattr(conversion, "operations", ())):
        model._weight_conversions = None        # transformers then uses the model type's own


def model_card(model, name, calibration=None):
    """The README.md of a checkpoint: what was quantized, how, and how to load it."""
    config = model.config.to_dict()["quantization_config"]
    bits, size = config["bits"], config["group_size"]
    base = model.config.name_or_path or "unknown"
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    link = f"base_model: {base}\n" if on_hub else ""
    return f"""---
library_name: transformers
{link}tags: [awq, {bits}-bit]
---
# {name}

{Path(base).name}, quantized with AWQ (arXiv 2306.00978): {bits} bits, asymmetric, groups of {size};
calibration: {calibration or "not recorded"}.
In full precision: {", ".join(config["modules_to_not_convert"]) or "no Linear"}.

To load it, with the files of the repository that wrote it: `import awq; awq.register()`, then
`AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")`.
"""


# ---- Full-precision sources ----------------------------------------------------------------------


def load_pretrained(name, **kwargs):
    """A full-precision model from a folder, the hub or a .gguf file, in the dtype it is stored in.

    On a CPU without bfloat16 instructions a 16-bit model becomes float32, unless kwargs say dtype.
    ValueError that names the model, also for one that quantize_model would refuse.
    """
    model = load_whole(name, ("missing", "mismatched"), **kwargs)
    check_plain(model)
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    slow = model.device.type == "cpu" and not fast
    return model.float() if slow and not {"dtype", "torch_dtype"} & kwargs.keys() else model


def load_tokenizer(name, **kwargs):
    """The tokenizer of a folder, a hub model or a .gguf file; ValueError that names the model."""
    where, options = place_of(name)
    try:
        return AutoTokenizer.from_pretrained(where, **{"trust_remote_code": False, **options,
                                                       **kwargs})
    except Exception as error:
        raise ValueError(f"model {name} has no tokenizer that can be loaded: "
                         f"{reason(name, error)}") from error


def check_plain(model):
    """ValueError unless model is a decoder-only transformers model with plain weights."""
    kind = type(model).__name__
    if not (hasattr(model, "base_model") and hasattr(model, "config")):
        raise ValueError(f"model is a {kind}: it must be a transformers causal LM")
    adapters = getattr(model, "peft_config", None)
    if adapters or any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("model has an adapter: merge it first (merge_and_unload())")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model is a {kind}, an encoder-decoder: a decoder-only model is needed")
    config = model.config.to_dict().get("quantization_config") or {}
    in_part = any(isinstance(m, AWQLinear) for m in model.modules())        # after Ctrl-C
    method = "awq" if in_part else config.get("quant_method")
    if method not in (None, "gguf"):                # what was read from GGUF may be plain
        raise ValueError(f"model is quantized already ({getattr(method, 'value', method)}): it "
                         "must have full-precision weights")
    for name, p in model.named_parameters():
        if p.is_meta or type(p.data) is not torch.Tensor or p.dtype not in DTYPES:
            raise ValueError(f"{name} is a {type(p.data).__name__} {p.dtype} on {p.device}: it "
                             "must be a plain float32, float16 or bfloat16 tensor in memory")


def check_device(name):
    """The torch.device; ValueError unless a tensor can be put there."""
    try:
        probe = torch.zeros(1, dtype=torch.float32, device=name)
        probe.tolist()      # "meta" has no values
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {str(name)!r}: {str(error).splitlines()[0]}") from None
