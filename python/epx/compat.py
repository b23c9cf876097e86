"""install_as_deep_ep: let programs written for deep_ep import epx under that name."""
import sys
import types
from importlib.machinery import ModuleSpec

from .errors import Error


def install_as_deep_ep():
    """Put modules ``deep_ep``, ``deep_ep.utils``, ``deep_ep.buffer`` and ``deep_ep_cpp`` into sys.modules.

    Never done by importing epx. A second call does nothing. Raises epx.Error when the real deep_ep is loaded.
    """
    import epx
    loaded = sys.modules.get("deep_ep")
    if getattr(loaded, "__epx__", False):
        return
    if loaded is not None or "deep_ep_cpp" in sys.modules:
        raise Error("deep_ep is loaded already (%s): call epx.install_as_deep_ep() before anything imports it" %
                    getattr(loaded, "__file__", "deep_ep_cpp"))
    shared = {name: getattr(epx, name) for name in
              ("Buffer", "Config", "EventOverlap", "EventHandle", "topk_idx_t", "__version__")}

    def module(name, names):
        made = types.ModuleType(name, "epx under the name of deep_ep")
        made.__epx__ = True
        made.__spec__ = ModuleSpec(name, None, is_package=name == "deep_ep")  # programs probe by importlib.util.find_spec
        made.__package__ = "deep_ep" if name.startswith("deep_ep.") or name == "deep_ep" else ""
        for one in names:
            setattr(made, one, shared[one])
        sys.modules[name] = made
        return made

    top = module("deep_ep", shared)
    top.__path__ = []  # a package
    top.utils = module("deep_ep.utils", ("EventOverlap", "EventHandle"))
    top.buffer = module("deep_ep.buffer", ("Buffer", "Config", "EventOverlap", "EventHandle"))
    module("deep_ep_cpp", ("Config", "EventHandle", "topk_idx_t"))
