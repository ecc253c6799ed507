"""The public face of the document's JSON form: writing, reading, validation, migration; reports likewise."""

from __future__ import annotations

from collections import Counter

from ckptconv.errors import Problem
from ckptconv.facts import value_to_json
from ckptconv.manifest import FileEntry, from_json, to_json
from ckptconv.report import REPORT_VERSION, Plan, Report
from ckptconv.skeleton import is_skeleton_file, read_skeleton, write_skeleton
from ckptconv.strictjson import Json
from ckptconv.validation import (
    MIGRATIONS,
    load_schema,
    migrate,
    schema_problems,
    validate_manifest,
)

__all__ = [
    "MIGRATIONS",
    "FileEntry",
    "from_json",
    "is_skeleton_file",
    "load_schema",
    "migrate",
    "problem_to_json",
    "read_skeleton",
    "report_to_json",
    "schema_problems",
    "to_json",
    "validate_manifest",
    "write_skeleton",
]


def problem_to_json(problem: Problem) -> dict[str, Json]:
    """One problem, as reports and the command line give it."""
    return {
        "code": problem.code,
        "loc": list(problem.loc),
        "message": problem.message,
        "hint": problem.hint,
    }


def report_to_json(report: Report) -> dict[str, Json]:
    """The report, valid against its schema."""
    return {
        "schema": "ckptconv/report",
        "schema_version": REPORT_VERSION,
        "source": report.source,
        "chosen": report.chosen,
        "target": report.target,
        "source_dialect": report.source_dialect,
        "target_dialect": report.target_dialect,
        "dry_run": report.dry_run,
        "progress": {name: value_to_json(value) for name, value in report.progress.items()},
        "ledger": [
            {
                "item": list(entry.item),
                "fate": entry.fate,
                "target": entry.target,
                "ops": [dict(op) for op in entry.ops],
                "evidence": entry.evidence,
                "detail": entry.detail,
                "allowed_by": entry.allowed_by,
            }
            for entry in report.ledger
        ],
        "verdicts": [
            {
                "optimizer": verdict.optimizer,
                "source": verdict.source,
                "target": verdict.target,
                "verdict": verdict.verdict,
                "residuals": list(verdict.residuals),
            }
            for verdict in report.verdicts
        ],
        "target_requires": list(report.target_requires),
        "restore": report.restore,
        "problems": [problem_to_json(problem) for problem in report.problems],
        "plan": None if report.plan is None else _plan_to_json(report.plan),
        "allowed": list(report.allowed),
        "files": [{"name": name, "bytes": nbytes} for name, nbytes in report.files],
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "seconds": report.seconds,
        "verified": report.verified,
        "extensions": {},
    }


def _plan_to_json(plan: Plan) -> dict[str, Json]:
    fates = Counter(row.fate for row in plan.rows)
    return {
        "counts": {
            "rows": len(plan.rows),
            **{fate: fates[fate] for fate in sorted(fates)},
            "left_in_source": len(plan.left_in_source),
            "left_in_target": len(plan.left_in_target),
        },
        "rows": [
            {
                "target": list(row.target),
                "dtype": row.dtype,
                "shape": list(row.shape),
                "axes": None if row.axes is None else [list(side) for side in row.axes],
                "producers": [
                    {"item": list(producer.item), "ops": [dict(op) for op in producer.ops]}
                    for producer in row.producers
                ],
                "fate": row.fate,
                "evidence": row.evidence,
            }
            for row in plan.rows
        ],
        "left_in_source": [list(address) for address in plan.left_in_source],
        "left_in_target": [list(address) for address in plan.left_in_target],
    }
