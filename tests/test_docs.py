"""Examples in docstrings run as they are printed, and public names have them."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
import torch

import picnn_fast
import picnn_fast.functional

MODULES = [
    "picnn_fast",
    *sorted(
        module.name
        for module in pkgutil.walk_packages(picnn_fast.__path__, "picnn_fast.")
        # __main__ runs the command; _C has no Python source to hold examples.
        if module.name.rpartition(".")[2] not in ("__main__", "_C")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "pip install 'picnn_fast[" in str(error):
            pytest.skip(str(error))
        raise
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in picnn_fast.functional.__all__
        if inspect.isfunction(getattr(picnn_fast.functional, name))
    ],
)
def test_every_public_function_has_an_example_and_says_what_it_takes(name):
    function = getattr(picnn_fast.functional, name)
    text = inspect.getdoc(function) or ""
    assert doctest.DocTestParser().get_examples(text), f"{name} has no example"
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"{name} has no {section}"
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\b{argument}\b", text), f"{name} does not explain {argument}"


@pytest.mark.parametrize("name", picnn_fast.__all__)
def test_public_names_are_there_and_documented(name):
    value = getattr(picnn_fast, name)
    if callable(value):
        assert inspect.getdoc(value)
