"""What pyproject.toml cannot say: the one part in C, without which everything else works.

It is a library for plugins in C to link with, not an extension module; it is built like one, and
a machine without a compiler goes on without it. It uses nothing of Python, neither headers nor
functions: so what is built with one version of Python is good for all (the tag abi3 says that;
free-threaded Pythons, which know no such tag, get one of their own).
"""

import sysconfig

from setuptools import Extension, setup

any_python = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "pynbdkit.native._symbols",
            ["src/pynbdkit/native/symbols.c"],
            extra_compile_args=["-fvisibility=hidden"],
            py_limited_api=any_python,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if any_python else {},
)
