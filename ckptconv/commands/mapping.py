"""`ckptconv map`: a mapping file to start from, and what one covers."""

from __future__ import annotations

import typer

from ckptconv.console import outcome, print_json, show, stop, write
from ckptconv.options import (
    AsJson,
    Force,
    From,
    MapBegun,
    MapCheck,
    MapOutput,
    MapTemplate,
    Select,
    Source,
    SourceSpec,
    TemplateSpec,
    Verbose,
    parse_container,
)


def map_names(
    source: Source,
    template: MapTemplate,
    output: MapOutput = None,
    check: MapCheck = None,
    mapping: MapBegun = None,
    from_: From = None,
    source_spec: SourceSpec = None,
    template_spec: TemplateSpec = None,
    select: Select = None,
    force: Force = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Write a mapping file to start from: what is matched by itself as rules, the rest as a list of work.

    Edit it, then pass it to convert with --mapping, in either direction. With --check nothing is written:
    it says what each rule of a mapping file covers; a rule that covers nothing and a parameter without a
    partner are problems.

    Example: ckptconv map run.pt fresh/ckpt-1 -o names.json

    Then: ckptconv map run.pt fresh/ckpt-1 --check names.json
    """
    if check is not None and (output is not None or mapping is not None):
        raise typer.BadParameter("it writes nothing: leave --output and --mapping out.", param_hint="--check")
    with outcome(as_json=as_json):
        from ckptconv import correspondence
        from ckptconv.detect import open

        format_, dialect = parse_container("--from", from_)
        ours = open(source, format=format_, dialect=dialect, select=select or ())
        if check is not None:
            found = correspondence.check_mapping(
                check, ours, template, source_spec=source_spec, template_spec=template_spec
            )
            if as_json:
                print_json(correspondence.coverage_to_json(found))
            else:
                from ckptconv.rendering.mapping import coverage_view

                show(coverage_view(found, names=(source.name, template.name), verbose=verbose))
            if found.problems:
                stop(found.problems, as_json=as_json)
            return
        drafted = correspondence.draft_mapping(
            ours, template, mapping=mapping, source_spec=source_spec, template_spec=template_spec
        )
        from ckptconv import mapping_file

        if output is None:
            write(mapping_file.text_of(drafted))
            return
        mapping_file.write_mapping(drafted, output, force=force)
        if as_json:
            print_json(mapping_file.to_json(drafted))
        else:
            from ckptconv.rendering.mapping import draft_view

            show(draft_view(drafted, str(output)))
