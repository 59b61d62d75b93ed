import setuptools

# Optional: nova_ftvm.core.words does the same without it.
WORDS = setuptools.Extension("nova_ftvm.core._words", ["nova_ftvm/core/_words.c"], extra_compile_args=["-O3"],
                             optional=True)

setuptools.setup(setup_requires=["pbr>=6.1.1"], pbr=True, ext_modules=[WORDS])
