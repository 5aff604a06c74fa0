"""Which prompts an evaluation draws: those of the edit, those that it never saw, and everyday ones.

Unseen prompts come in three kinds, and each must be drawn right by the unedited model before it counts: templates,
other names of the subject, and compositions with other words. A model with a vocabulary gets compositions of its own
styles and backgrounds; any other gets scenes. Everyday prompts never hold a name that is edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from math import gcd

from diffedit.interfaces import Vocabulary
from diffedit.request import Kind, Request
from diffedit.text import find, render, with_article

UNSEEN_TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "object": (
        "this is a {}",
        "one {}",
        "a small {}",
        "my {}",
        "a close-up of a {}",
        "a sketch of a {}",
        "a rendering of a {}",
        "here you see a {}",
        "a good picture of a {}",
    ),
    "style": (
        "something in the style of {}",
        "drawn in the style of {}",
        "a {} picture",
        "a scene in {} style",
        "made in the style of {}",
    ),
}
SCENES: dict[Kind, tuple[str, ...]] = {
    "object": (
        "a {} in a forest",
        "a {} on a wooden table",
        "a {} at night in the rain",
        "a {} in front of a mountain",
        "a red umbrella over a {}",
        "a watercolour of a {} by the sea",
        "two people looking at a {}",
        "a {} covered in snow",
    ),
    "style": (
        "a mountain lake in the style of {}",
        "an old man in the style of {}",
        "a busy street in the style of {}, at night",
        "a bowl of fruit, {} style",
        "a portrait of a woman in the style of {}",
    ),
}
GENERAL_STYLES = (
    "a watercolour",
    "an oil painting",
    "a pencil sketch",
    "pixel art",
    "a cartoon",
    "a woodcut",
    "Van Gogh",
    "Monet",
    "Picasso",
    "Hokusai",
    "Rembrandt",
    "Andy Warhol",
)


@cache
def everyday_file() -> tuple[str, ...]:
    """The bundled everyday prompts."""
    text = (files("diffedit") / "assets" / "prompts" / "everyday.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def edit_prompts(request: Request) -> tuple[str, ...]:
    """The prompts that the edit was solved for."""
    return tuple(prompt for prompt, _ in request.render(request.subject))


def unseen_templates(request: Request) -> tuple[str, ...]:
    """General templates that the edit was not solved for, filled."""
    seen = {template.casefold() for template in request.templates}
    fresh = (template for template in UNSEEN_TEMPLATES[request.kind] if template.casefold() not in seen)
    return tuple(render(template, request.subject)[0] for template in fresh)


def other_names(request: Request, more: Sequence[str] = (), forms: bool = True) -> tuple[str, ...]:
    """Other names of the subject: those given, those of the request, and for an object its plural and hyphenation.

    Args:
        request: the request.
        more: names given.
        forms: whether the subject has a plural and a hyphenation; "mascot of rome" has none.

    >>> other_names(Request(subject="crystal ball"))
    ('crystal balls', 'crystal-ball')
    """
    names = [*more, *request.aliases]
    if request.kind == "object" and forms:
        names.append(plural(request.subject))
        names += [request.subject.replace(" ", "-")] if " " in request.subject else []
        names += [request.subject.replace("-", " ")] if "-" in request.subject else []
    own = request.subject.casefold()
    return tuple({name.casefold(): name for name in reversed(names) if name.casefold() != own}.values())[::-1]


def alias_prompts(request: Request, more: Sequence[str] = (), forms: bool = True) -> tuple[str, ...]:
    """The edit's first templates around each other name, name by name within each template; see `other_names`."""
    names = other_names(request, more, forms)
    many = plural(request.subject).casefold()
    out = []
    for template in request.templates[:6]:
        for name in names:
            bare = template.replace("a {}", "{}") if name.casefold() == many else template
            out.append(render(bare, name)[0])
    return tuple(dict.fromkeys(out))


def compositions(request: Request, vocabulary: Vocabulary, edited: Sequence[str]) -> tuple[str, ...]:
    """The subject with other words, in prompts that the edit was not solved for and that name no other edited concept.

    Args:
        request: the request.
        vocabulary: of the model; its styles and backgrounds are combined if it has any.
        edited: every name that the edit changes.
    """
    if request.kind == "object" and vocabulary.styles:
        grounds = vocabulary.backgrounds
        forms = [f"a {{}} in the style of {style}" for style in vocabulary.styles]
        forms += [f"a {{}} on a {ground} background" for ground in grounds]
        forms += [
            f"a {{}} in the style of {style} on a {grounds[(i + j) % len(grounds)]} background"
            for j in range(min(2, len(grounds)))
            for i, style in enumerate(vocabulary.styles)
        ]
    elif request.kind == "style" and vocabulary.objects:
        forms = [f"{with_article(name)} in the style of {{}}" for name in vocabulary.objects[::4]]
    else:
        forms = list(SCENES[request.kind])
    seen = {template.casefold() for template in request.templates}
    fresh = [form for form in forms if form.casefold() not in seen and not _mentions(form, edited)]
    return tuple(render(form, request.subject)[0] for form in fresh)


def everyday(vocabulary: Vocabulary, edited: Sequence[str], count: int) -> tuple[str, ...]:
    """At most `count` prompts without any edited name; fewer if there are no more.

    A vocabulary gives one prompt per object, spread over it, with its templates, styles and backgrounds in turn.
    """
    if not vocabulary.objects:
        return tuple(prompt for prompt in everyday_file() if not _mentions(prompt, edited))[:count]
    templates = vocabulary.templates or ("{}",)
    styles, grounds = vocabulary.styles or ("",), vocabulary.backgrounds or ("",)
    endings = [""]
    for i in range(max(len(styles), len(grounds))):
        endings += [f" in the style of {styles[i % len(styles)]}"] if any(styles) else []
        endings += [f" on a {grounds[i % len(grounds)]} background"] if any(grounds) else []
    endings = list(dict.fromkeys(endings))
    out: dict[str, None] = {}
    for i in range(len(vocabulary.objects) * len(templates)):
        name = vocabulary.objects[(i * stride(len(vocabulary.objects))) % len(vocabulary.objects)]
        prompt = templates[i % len(templates)].format(with_article(name)) + endings[i % len(endings)]
        if not _mentions(prompt, edited):
            out[prompt] = None
        if len(out) == count:
            break
    return tuple(out)


def plural(phrase: str) -> str:
    """The regular plural of the last word.

    >>> [plural(word) for word in ("dog", "bus", "church", "strawberry", "key", "scissors")]
    ['dogs', 'buses', 'churches', 'strawberries', 'keys', 'scissors']
    """
    lower = phrase.casefold()
    if lower.endswith("y") and lower[-2:-1] not in "aeiou":
        return phrase[:-1] + "ies"
    if lower.endswith(("ss", "us", "x", "ch", "sh", "z")):
        return phrase + "es"
    return phrase if lower.endswith("s") else phrase + "s"


def _mentions(prompt: str, names: Sequence[str]) -> bool:
    return any(find(prompt, name) for name in names)


def stride(n: int) -> int:
    """A step that visits all of n before it repeats, and jumps across categories: about 0.38 n, coprime to n."""
    step = max(1, round(0.382 * n))
    while gcd(step, n) != 1:
        step += 1
    return step
