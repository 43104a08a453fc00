"""Names of programming and markup languages, from file names and from data set columns."""

from __future__ import annotations

from pathlib import PurePosixPath

# Language -> the suffixes of its files, without the dot.
_SUFFIXES = {
    "assembly": "asm s",
    "c": "c h",
    "clojure": "clj cljs cljc",
    "cmake": "cmake",
    "cpp": "cpp cc cxx hpp hh hxx cu cuh ipp tpp",
    "csharp": "cs",
    "css": "css scss sass less",
    "dart": "dart",
    "elixir": "ex exs",
    "erlang": "erl hrl",
    "fortran": "f f77 f90 f95 f03 f08 for",
    "go": "go",
    "groovy": "groovy gradle",
    "haskell": "hs lhs",
    "html": "html htm xhtml",
    "java": "java",
    "javascript": "js jsx mjs cjs",
    "json": "json",
    "julia": "jl",
    "kotlin": "kt kts",
    "lean": "lean",
    "lua": "lua",
    "markdown": "md markdown mdx",
    "ocaml": "ml mli",
    "perl": "pl pm",
    "php": "php phtml",
    "powershell": "ps1 psm1 psd1",
    "protobuf": "proto",
    "python": "py pyi pyx pxd",
    "r": "r",
    "restructuredtext": "rst",
    "ruby": "rb rake gemspec",
    "rust": "rs",
    "scala": "scala sc",
    "shell": "sh bash zsh ksh",
    "sql": "sql",
    "swift": "swift",
    "tex": "tex sty cls bib",
    "text": "txt text",
    "toml": "toml",
    "typescript": "ts tsx mts cts",
    "verilog": "v sv svh",
    "vhdl": "vhd vhdl",
    "xml": "xml xsd xsl xslt svg",
    "yaml": "yaml yml",
    "zig": "zig",
}
_BY_SUFFIX = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_BY_FILE_NAME = {
    "dockerfile": "dockerfile",
    "makefile": "makefile",
    "gnumakefile": "makefile",
    "cmakelists.txt": "cmake",
    "rakefile": "ruby",
    "gemfile": "ruby",
    "jenkinsfile": "groovy",
}
# Of the languages above, those of prose and of data.
_NOT_CODE = frozenset("html json markdown restructuredtext tex text toml xml yaml".split())
_OTHER_NAMES = {
    "c++": "cpp",
    "c#": "csharp",
    "c-sharp": "csharp",
    "golang": "go",
    "bash": "shell",
    "python3": "python",
    "ecmascript": "javascript",
    "objective-c++": "objective-cpp",
}


def language_of_path(path: str) -> str | None:
    """Return the language of a file by its name, None if no table has it.

    >>> language_of_path("src/main.RS"), language_of_path("Makefile"), language_of_path("LICENSE")
    ('rust', 'makefile', None)
    """
    name = PurePosixPath(path.replace("\\", "/")).name.lower()
    return _BY_FILE_NAME.get(name) or _BY_SUFFIX.get(name.rpartition(".")[2] if "." in name else "")


def is_code(language: str | None) -> bool:
    """Return true for a programming language of the tables.

    >>> is_code("python"), is_code("markdown"), is_code("en"), is_code(None)
    (True, False, False, False)
    """
    known = language in _SUFFIXES or language in _BY_FILE_NAME.values()
    return known and language not in _NOT_CODE


def language_of_name(value: str) -> str | None:
    """Return one spelling for the ways in which data sets name a language; None for no name.

    A suffix counts as a name. A name that no table has is kept in lower case: ``en``, ``cobol``.

    >>> [language_of_name(value) for value in ("C++", "py", ".rs", "Python", "en", " ")]
    ['cpp', 'python', 'rust', 'python', 'en', None]
    """
    name = value.strip().lower().removeprefix(".")
    if name in _SUFFIXES:
        return name
    return _OTHER_NAMES.get(name) or _BY_SUFFIX.get(name) or name or None
