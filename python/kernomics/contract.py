"""The contract of an op: one annotated NumPy function, resolved once into checks, shapes and work.

    @op(flops=lambda m, n, k: 2 * m * n * k, cases=[Case(m=1, n=2112, k=7168)], kernels=[...])
    def fp8_gemm(a: FP8["m k"], a_scale: F32["m k/128"], ...) -> BF16["m n"]: ...

Grammar of a dims string, words separated by spaces:

    512        that size                      2*n    binds n; the size must divide
    m          binds m, or checks it          e+1    binds e if nothing else does, else checks
    k/128      ceil(k / 128), checks          t*k    a product, checks
    ...        any leading dims (first word only), bound to ``lead``

``A["..."] | B["..."]`` are alternatives, ``| None`` makes the argument optional. This file needs the
standard library only; array libraries register their dtypes in ``CODES``.
"""

import functools
import importlib
import inspect
import re
import typing
import warnings
from dataclasses import dataclass
from math import prod

from kernomics import chip

NAMES = ("f32", "bf16", "fp8", "u8", "i32", "i64")  # position = dtype code, as in csrc/tensor.h
ITEMSIZE = {"f32": 4, "bf16": 2, "fp8": 1, "u8": 1, "i32": 4, "i64": 8}
CODES = {}  # array library's dtype -> code; also accepted spellings of a dtype keyword
OPS = {}  # name -> Op, in order of definition


class ContractError(ValueError):
    """The caller's arguments break the op's contract: says op, argument, got, expected."""


class NoKernel(RuntimeError):
    """No kernel takes this call: says each kernel and why it refused."""


# ---------------------------------------------------------------- dtypes and dims


@functools.cache
def _compiled(code):
    return compile(code, "<dim>", "eval")


@dataclass(frozen=True)
class Dim:
    kind: str  # lead, int, name, times (int*name), ceil, plus, product
    a: str | int
    b: str | int | None
    text: str

    @staticmethod
    def parse(text):
        if text == "...":
            return Dim("lead", "lead", None, text)
        if text.isdigit():
            return Dim("int", int(text), None, text)
        m = re.fullmatch(r"(\w+)(?:([*/+])(\w+))?", text)
        if not m:
            raise SyntaxError(f"dim {text!r} is outside the grammar of contract.py")
        a, sign, b = m.groups()
        if sign is None:
            return Dim("name", a, None, text)
        a, b = (int(x) if x.isdigit() else x for x in (a, b))
        if sign == "*":
            return Dim("times" if isinstance(a, int) else "product", a, b, text)
        return Dim("ceil" if sign == "/" else "plus", a, b, text)

    @property
    def binds(self):
        """The dim name this word can bind, or None."""
        return {"name": self.a, "times": self.b, "plus": self.a}.get(self.kind)

    @property
    def code(self):
        """Python source of the expected size, in terms of dim names."""
        a, b = self.a, self.b
        return {
            "int": f"{a}", "name": f"{a}", "times": f"{a}*{b}", "product": f"{a}*{b}",
            "plus": f"{a}+{b}", "ceil": f"-(-{a}//{b})",
        }[self.kind]

    def size(self, dims):
        return eval(_compiled(self.code), {}, dims)  # the code is built from the grammar above


@dataclass(frozen=True)
class Alternative:
    dtypes: tuple  # accepted names; ("like", arg) or ("keyword", arg) for outputs
    dims: tuple

    def shape(self, dims):
        sizes = []
        for word in self.dims:
            sizes += dims["lead"] if word.kind == "lead" else [word.size(dims)]
        return tuple(sizes)

    @property
    def has_lead(self):
        return bool(self.dims) and self.dims[0].kind == "lead"

    def __str__(self):
        return f"{'|'.join(self.dtypes)}[{' '.join(d.text for d in self.dims)}]"


@dataclass(frozen=True)
class Spec:
    alternatives: tuple
    optional: bool = False

    def __or__(self, other):
        if other is None:
            return Spec(self.alternatives, True)
        return Spec(self.alternatives + other.alternatives, self.optional or other.optional)

    def __str__(self):
        return " or ".join(map(str, self.alternatives)) + (" or None" if self.optional else "")

    def pick(self, dtype=None):
        """(dtype name, alternative) for a chosen dtype, by default the first."""
        for alt in self.alternatives:
            for name in alt.dtypes:
                if dtype in (None, name):
                    return name, alt
        raise ValueError(f"{dtype} is not among {self}")


@dataclass(frozen=True)
class Dtypes:
    names: tuple

    def __getitem__(self, dims):
        return Spec((Alternative(self.names, tuple(map(Dim.parse, dims.split()))),))

    def __or__(self, other):
        return Dtypes(self.names + other.names)


F32, BF16, FP8, U8, I32, I64 = (Dtypes((n,)) for n in NAMES)


def like(arg):
    """An output whose dtype is that of argument ``arg``."""
    return Dtypes(("like", arg))


def keyword(arg):
    """An output whose dtype is the value of keyword ``arg``."""
    return Dtypes(("keyword", arg))


# ---------------------------------------------------------------- cases, kernels, work


class Case(dict):
    """Dims and scalars of one call; ``bench`` names it as a bench row and a cost-model point.

    A tensor's name picks its dtype (``kv_cache="u8"``) or leaves an optional one out (``bias=None``).
    """

    def __init__(self, bench=None, **values):
        super().__init__(values)
        self.bench = bench

    @property
    def id(self):
        def word(v):
            return "x".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v)

        return "_".join(f"{k}{word(v)}" for k, v in self.items()).replace(" ", "") or "default"


@dataclass
class Kernel:
    """``target`` is ``module:function``; ``where(**dims)`` are its limits.

    ``on`` is "cpu", "gpu" (any), or how the GPU's family starts: "sm90", "sm" (any of NVIDIA).

    ``workspace(dims, chip)`` gives the bytes of its one uint8 workspace, from shapes alone; by default the function of
    that name in the target's module, if there is one.
    """

    name: str
    target: str
    on: str = "cpu"
    where: typing.Callable | None = None
    workspace: typing.Callable | None = None
    function: typing.Callable | None = None

    @property
    def native(self):
        """Compiled code, which takes addresses and a stream (or threads); others take the tensors themselves."""
        return self.target.startswith("kernomics._")

    def load(self):
        module, _, name = self.target.partition(":")
        module = importlib.import_module(module)
        self.function = getattr(module, name)
        self.workspace = self.workspace or getattr(module, "workspace", None)
        return self.function

    def fits(self, device):
        """Whether it runs on "cpu" or a GPU's family at all."""
        return device != "cpu" if self.on == "gpu" else device.startswith(self.on)

    def refusal(self, device, dims):
        """Why this kernel does not take the call on "cpu" or a GPU's family, or None if it does."""
        if not self.fits(device):
            return f"runs on {self.on}, the tensors are on {device}"
        if self.where is not None and not _call(self.where, dims):
            return "its `where` excludes these dims"
        if self.function is None:
            try:
                self.load()
            except ImportError as error:
                return str(error)
        return None


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes that the definition of a call needs, whatever kernel runs it."""

    flops: float
    bytes: float


def _call(fn, values):
    """Call ``fn`` with those of ``values`` that its parameters name."""
    names = _parameters(fn)
    return fn(**values) if names is None else fn(**{n: values[n] for n in names if n in values})


def _parameters(fn):
    cached = _parameters.cache.get(fn)
    if cached is None:
        ps = inspect.signature(fn).parameters.values()
        cached = [p.name for p in ps if p.kind != p.VAR_KEYWORD]
        if len(cached) != len(ps):
            cached = False
        _parameters.cache[fn] = cached
    return None if cached is False else cached


_parameters.cache = {}


# ---------------------------------------------------------------- the op


@dataclass(frozen=True)
class Scalar:
    name: str
    type: typing.Any
    default: typing.Any

    @property
    def choices(self):
        if isinstance(self.type, Dtypes):
            return self.type.names
        return typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else None

    @property
    def required(self):
        return self.default is inspect.Parameter.empty

    @property
    def expected(self):
        if self.choices:
            return " or ".join(map(repr, self.choices))
        return {int: "an int", float: "a finite number", bool: "a bool"}.get(self.type, "two positive ints")

    def normalize(self, v):
        """The value in its canonical form; raises ValueError or TypeError when it is not one."""
        if isinstance(self.type, Dtypes):
            v = NAMES[CODES[v]] if not isinstance(v, str) or v not in self.type.names else v
        if self.choices:
            if v not in self.choices:
                raise ValueError
        elif self.type is bool:
            if type(v).__name__ not in ("bool", "bool_", "SymBool"):
                raise TypeError
        elif self.type is int:
            if isinstance(v, bool):
                raise TypeError
            v = v.__index__() if type(v) is not int and not type(v).__name__ == "SymInt" else v
        elif self.type is float:
            if isinstance(v, (bool, str)):
                raise TypeError
            v = float(v)
            if not abs(v) < float("inf"):
                raise ValueError
        else:
            v = tuple(v)
            if len(v) != 2 or any(type(x) is not int or x < 1 for x in v):
                raise ValueError
        return v


class Op:
    """One op: contract, definition, work, cases, kernels. Made by ``@op``.

    ``op(...)`` runs it, ``op.define(...)`` is the NumPy body (float64 out), ``op.bind(...)`` checks a
    call and returns ``(dims, codes, scalars, sizes)``, ``op.shapes(dims, codes, scalars)`` the outputs' shapes,
    strides and dtype codes.
    """

    def __init__(self, define, *, flops, cases, kernels=(), bytes=None, sample=None, check=None, dims=None,
                 mutates=(), contiguous=(), check_data=None, rows=None, judge=None, host=False):
        self.name, self.define, self.__doc__ = define.__name__, define, define.__doc__
        self.cases, self.kernels, self.host = list(cases), list(kernels), host
        self.check, self.check_data, self.rows, self.judge = check, check_data, rows, judge
        self.mutates, self.contiguous = frozenset(mutates), frozenset(contiguous)
        self._flops, self._bytes, self.draw = flops, bytes, sample
        self.tensors, self.scalars = {}, []
        for p in inspect.signature(define).parameters.values():
            if isinstance(p.annotation, Spec):
                self.tensors[p.name] = p.annotation
            else:
                self.scalars.append(Scalar(p.name, p.annotation, p.default))
        self.choices = [{c: i for i, c in enumerate(s.choices or ())} for s in self.scalars]
        self.parameters = list(inspect.signature(define).parameters.values())
        out = inspect.signature(define).return_annotation
        self.outs = () if out is None else out if isinstance(out, tuple) else (out,)
        # Keywords that bind dims: by equal name, by `dims={"e": "n_experts"}`, tuples as block -> block0, block1.
        self.keyword_dims = dict(dims or {})
        used = {d.binds or d.a for s in (*self.tensors.values(), *self.outs) for alt in s.alternatives for d in alt.dims}
        used |= {d.b for s in (*self.tensors.values(), *self.outs) for alt in s.alternatives for d in alt.dims}
        for s in self.scalars:
            if s.type is int and s.name in used:
                self.keyword_dims[s.name] = s.name
            if f"{s.name}0" in used:
                self.keyword_dims.update({f"{s.name}0": f"{s.name}[0]", f"{s.name}1": f"{s.name}[1]"})
        self.numpy_call = self.torch_call = None  # set by numpy_ops and torch_ops
        self.bind, self.shapes, self.public = self._compile()

    def __call__(self, *args, **kwargs):
        return self.public(*args, **kwargs)

    def __repr__(self):
        return f"<op {self.name}>"

    # -- resolution: three functions written once as source, so that a call costs a few microseconds

    def _compile(self):
        names, scalars = list(self.tensors), [s.name for s in self.scalars]
        bound, lines, checks = dict(self.keyword_dims), [], []
        lead_owner = None
        pending = []  # `e+1` binds only what no other word does
        for dim, source in self.keyword_dims.items():
            lines.append(f"D_{dim}={source}")

        def source_of(word):  # dims live under D_ so that no argument's name is taken
            return re.sub(r"\b([a-z_]\w*)\b", r"D_\1", word.code)
        for i, (name, spec) in enumerate(self.tensors.items()):
            ranks = {len(alt.dims) for alt in spec.alternatives}
            if len(ranks) > 1:
                raise SyntaxError(f"{self.name}: alternatives of {name} differ in rank")
            has_lead = spec.alternatives[0].has_lead
            words = [f"x{i}_{j}" for j in range(len(spec.alternatives[0].dims))]
            target = ", ".join(("*" if has_lead and j == 0 else "") + w for j, w in enumerate(words))
            take = f"s{i}={name}.shape; {target}, = s{i}; c{i}=CODES[{name}.dtype]"
            binds = []
            for j, w in enumerate(words):
                same = {alt.dims[j] for alt in spec.alternatives}
                d = next(iter(same))
                if d.kind == "lead":
                    if lead_owner is None:
                        lead_owner, _ = i, binds.append(f"D_lead={w}")
                elif len(same) == 1 and d.kind in ("name", "times") and d.binds not in bound:
                    bound[d.binds] = i
                    binds.append(f"D_{d.binds}={w}" if d.kind == "name" else f"D_{d.b}={w}//{d.a}")
                elif len(same) == 1 and d.kind == "plus":
                    pending.append((d, w))
            if spec.optional:
                unset = "; ".join(f"{b.split('=')[0]}=0" for b in binds)
                lines.append(f"if {name} is None: c{i}=-1; s{i}=None{'; ' + unset if unset else ''}")
                lines.append("else:\n   " + "; ".join([take, *binds]))
            else:
                lines.append("; ".join([take, *binds]))
            alternatives = []
            for alt in spec.alternatives:
                code = [NAMES.index(n) for n in alt.dtypes]
                terms = [f"c{i}=={code[0]}" if len(code) == 1 else f"c{i} in {tuple(code)}"]
                for w, d in zip(words, alt.dims):
                    if d.kind == "lead":
                        terms += [] if lead_owner == i else [f"{w}==D_lead"]
                    elif not (d.kind == "name" and bound.get(d.binds) == i and f"D_{d.binds}={w}" in binds):
                        terms.append(f"{w}=={source_of(d)}")
                alternatives.append(" and ".join(terms))
            test = "(" + " or ".join(f"({a})" for a in alternatives) + ")" if len(alternatives) > 1 else alternatives[0]
            checks.append(f"(c{i}==-1 or ({test}))" if spec.optional else test)
        for d, w in pending:
            if d.binds not in bound:
                bound[d.binds] = w
                lines.append(f"D_{d.binds}={w}-{d.b}")
                checks.append(f"D_{d.binds}>=0")
        self.dim_names = list(bound) + (["lead"] if lead_owner is not None else [])
        for s in self.scalars:
            if s.choices and not isinstance(s.type, Dtypes):
                checks.append(f"{s.name} in {tuple(s.choices)!r}")
        normal = {s.name: s.name for s in self.scalars}
        normalize = []
        for i, s in enumerate(self.scalars):
            if isinstance(s.type, Dtypes):
                normalize.append(f"{s.name} = {s.name} if {s.name} in {s.type.names!r} else N{i}({s.name})")
            elif s.type is bool:
                normalize.append(f"if {s.name} is not True and {s.name} is not False: {s.name}=N{i}({s.name})")
            elif s.type is float:
                normalize.append(f"if type({s.name}) is not float or not abs({s.name}) < INF: {s.name}=N{i}({s.name})")
            elif s.type is int:
                normalize.append(f"if type({s.name}) is not int: {s.name}=N{i}({s.name})")
            elif not s.choices:
                normalize.append(f"{s.name}=N{i}({s.name})")
        self.normalize = normalize  # torch_ops checks scalars by the same source
        params = ", ".join(names + scalars)
        dims = ", ".join(f"'{d}':D_{d}" for d in self.dim_names)
        codes = ", ".join(f"c{i}" for i in range(len(names))) + ("," if names else "")
        sizes = "".join(f"s{i}, " for i in range(len(names)))
        body = "\n  ".join([*normalize, *lines])
        self.steps, self.checks = [*normalize, *lines], " and ".join(checks) or "True"  # torch_ops writes them into its calls
        bind = (
            f"def bind({params}):\n try:\n  {body}\n  if {self.checks}:\n"
            f"   return {{{dims}}}, ({codes}), ({''.join(normal[s] + ', ' for s in scalars)}), ({sizes})\n"
            f" except (AttributeError, KeyError, ValueError, TypeError, IndexError):\n  pass\n"
            f" explain({params})\n"
        )
        shapes = []
        for spec in self.outs:
            alt = spec.alternatives[0]
            words = ["*D_lead" if w.kind == "lead" else source_of(w) for w in alt.dims]
            strides = ["*".join(f"({w} or 1)" for w in words[i + 1:]) or "1" for i in range(len(words))]
            strides = f"({', '.join(strides)},)" if words and not alt.has_lead else "()" if not words else "None"
            if alt.dtypes[0] == "like":
                code = f"c{names.index(alt.dtypes[1])}"
            elif alt.dtypes[0] == "keyword":
                code = f"NAMES.index({alt.dtypes[1]})"
            else:
                code = str(NAMES.index(alt.dtypes[0]))
            shapes.append((f"({', '.join(words)}{',' if words else ''})", strides, code))
        self.out_sources = shapes
        shapes = "".join(f"({', '.join(x)}), " for x in shapes)
        shapes = re.sub(r"\bD_(\w+)", r"d['\1']", re.sub(r"\bc(\d+)\b", r"c[\1]", shapes))
        shapes = re.sub(r"index\((\w+)\)", lambda m: f"index(s[{scalars.index(m[1])}])", shapes)
        shapes = f"def shapes(d, c, s):\n return ({shapes})\n"

        def declare(p):
            return p.name if p.default is p.empty else f"{p.name}={p.default!r}"

        front = [declare(p) for p in self.parameters if p.kind != p.KEYWORD_ONLY]
        back = [declare(p) for p in self.parameters if p.kind == p.KEYWORD_ONLY]
        public = (
            f"def {self.name}({', '.join([*front, '*', *back, 'backend=None'])}):\n"
            f" call = op.numpy_call if isinstance({names[0]}, ARRAY) else op.torch_call or op.no_torch\n"
            f" return call({params}, backend)\n"
        )
        scope = {"CODES": CODES, "NAMES": NAMES, "INF": float("inf"), "explain": self.explain, "op": self, "ARRAY": Array}
        scope.update({f"N{i}": s.normalize for i, s in enumerate(self.scalars)})
        self.source = bind + shapes + public
        exec(compile(self.source, f"<contract of {self.name}>", "exec"), scope)
        scope[self.name].__doc__ = self.__doc__
        return scope["bind"], scope["shapes"], scope[self.name]

    def no_torch(self, *args):
        return self.explain(*args[:-1])

    # -- errors

    def error(self, argument, got, expected):
        """A ContractError that names op, argument, got and expected."""
        return ContractError(f"{self.name}: {argument} is {got}, expected {expected}")

    def explain(self, *args):
        """Raise the ContractError of a call that ``bind`` refused: the slow, talkative twin of ``bind``."""
        tensors = dict(zip(self.tensors, args))
        scalars = dict(zip((s.name for s in self.scalars), args[len(tensors):]))
        for s in self.scalars:
            try:
                scalars[s.name] = s.normalize(scalars[s.name])
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                raise self.error(s.name, repr(scalars[s.name]), s.expected) from None
        dims = {d: eval(src, {}, scalars) for d, src in self.keyword_dims.items()}
        chosen = {}
        for name, spec in self.tensors.items():
            x = tensors[name]
            if x is None and spec.optional:
                continue
            code = CODES.get(getattr(x, "dtype", None)) if hasattr(x, "shape") else None
            if code is None:
                got = f"of dtype {x.dtype}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
                raise self.error(name, got, f"{spec}")
            fits = [alt for alt in spec.alternatives if NAMES[code] in alt.dtypes]
            if not fits:
                raise self.error(name, f"of dtype {NAMES[code]}", f"{spec}")
            chosen[name] = fits[0]
            rank, got = len(fits[0].dims) - fits[0].has_lead, list(x.shape)
            if len(got) < rank or (len(got) > rank and not fits[0].has_lead):
                raise self.error(name, got, f"{rank} dims ({fits[0]})")
        for wanted in (("name", "lead"), ("times",), ("plus",), None):  # plain words bind first, then the others
            for name, alt in chosen.items():
                shape, words = list(tensors[name].shape), alt.dims
                if alt.has_lead:
                    split = len(shape) - len(words) + 1
                    shape = [shape[:split], *shape[split:]]
                for word, size in zip(words, shape):
                    if wanted and word.kind in wanted and (word.binds or word.a) not in dims:
                        dims[word.binds or word.a] = (
                            size // word.a if word.kind == "times" else size - word.b if word.kind == "plus" else size)
                    elif wanted is None:
                        want = dims["lead"] if word.kind == "lead" else word.size(dims)
                        if want != size or (word.kind == "plus" and dims[word.a] < 0):
                            text = " ".join(w.text for w in words)
                            raise self.error(name, list(tensors[name].shape), f"{list(alt.shape(dims))} ({text})")
        raise self.error("the call", "inconsistent", "the contract " + ", ".join(f"{n}: {s}" for n, s in self.tensors.items()))

    def choose(self, device, dims, backend=None):
        """The kernel that takes this call on "cpu" or a GPU's family; raises NoKernel with every refusal.

        On a GPU those come first that a record proves there; another one warns once.
        """
        reasons, proved = [], None if device == "cpu" else chip.proved(device)
        kernels = self.kernels if proved is None else sorted(self.kernels, key=lambda k: (self.name, k.name) not in proved)
        for k in kernels:
            why = k.refusal(device, dims) if backend in (None, k.name) else f"backend={backend!r} was asked for"
            if why is None:
                if proved is not None and (self.name, k.name) not in proved and backend is None:
                    warnings.warn(f"{self.name}: kernel {k.name!r} is unproved on {device}: no record shows its results right",
                                  stacklevel=4)  # once: Python shows a warning of one place and text once
                return k
            reasons.append(f"{k.name}: {why}")
        reasons.append('reference: runs only when asked for by name (backend="reference")')
        raise NoKernel(f"{self.name}: no kernel takes this call\n  " + "\n  ".join(reasons))

    # -- work

    def values(self, case):
        """Dims, scalars and dtype choices of a case with the scalars' defaults filled in."""
        values = {s.name: s.default for s in self.scalars if not s.required}
        values.update(case)
        for dim, source in self.keyword_dims.items():
            values[dim] = eval(source, {}, values)
        return values

    def layout(self, case):
        """name -> (dtype name, shape) of each input of a case; None for an optional one left out."""
        values, layout = self.values(case), {}
        for name, spec in self.tensors.items():
            if spec.optional and values.get(name, None) is None:
                layout[name] = None
                continue
            chosen = values.get(name)
            dtype, alt = spec.pick(chosen if isinstance(chosen, str) else None)
            layout[name] = dtype, alt.shape(values)
        return layout

    def work(self, **case):
        """FLOPs and bytes of a call with these dims (and scalars, and dtype choices)."""
        values = self.values(case)
        flops = _call(self._flops, values)
        if self._bytes is not None:
            return Work(flops, _call(self._bytes, values))
        layout = self.layout(case)
        total = sum(ITEMSIZE[x[0]] * prod(x[1]) for x in layout.values() if x)
        for spec in self.outs:
            alt = spec.alternatives[0]
            kind = alt.dtypes[0]
            dtype = layout[alt.dtypes[1]][0] if kind == "like" else values[alt.dtypes[1]] if kind == "keyword" else kind
            total += ITEMSIZE[dtype] * prod(alt.shape(values))
        return Work(flops, total)


class Array:
    """Stands for the NumPy array type until numpy_ops registers the real one."""


def op(**parts):
    """Make the decorated NumPy function an op; see the module's docstring and the class ``Op``.

    flops, bytes: functions of dims; sample(rng, **dims): inputs that a default draw would get wrong;
    check(error, <dims and scalars by name>) and check_data(error, <NumPy inputs, dims, scalars by name>) raise
    what the signature cannot say, with ``raise error(argument, got, expected)``; dims: {dim: keyword that
    binds it}; rows: the dim along which large cases are judged on a sample, or a function
    ``rows(rng, inputs) -> (inputs, select)``; judge(got, want, inputs): how a result is judged, with inputs and
    scalars by name, and an argument that the op mutates for its output.
    """

    def decorate(define):
        OPS[define.__name__] = made = Op(define, **parts)
        return made

    return decorate
