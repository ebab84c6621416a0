"""What pyproject.toml cannot say: the one part in C, without which everything else works.

It is a library for plugins in C to link with, not an extension module; it is built like one, and
a machine without a compiler goes on without it.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pynbdkit.native._symbols",
            ["src/pynbdkit/native/symbols.c"],
            extra_compile_args=["-fvisibility=hidden"],
            optional=True,
        )
    ]
)
