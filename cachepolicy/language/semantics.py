"""Checks names, types and positions of expressions in a policy, without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from cachepolicy.errors import Diagnostic, PolicyError, counted, suggestion
from cachepolicy.language import ir
from cachepolicy.language._lints import advise
from cachepolicy.language._selector_checks import is_itself, judge_selector, takes_model
from cachepolicy.language.params import typed
from cachepolicy.language.scope import (
    ARGUMENT,
    BOUND,
    EXPECTED,
    LITERAL,
    SETTING,
    WHEN,
    WHILE,
    ExpressionPlace,
    Finding,
    Report,
    Scope,
    Sort,
    scope_of,
)
from cachepolicy.language.traversal import walk
from cachepolicy.language.typecheck import Checker
from cachepolicy.language.validate import (
    WholeNumber,
    bare_mask,
    counts_of,
    is_mask,
    judge_shapes,
    regex_fault,
    within_bounds,
)
from cachepolicy.language.vocabulary import (
    APPROXIMATIONS,
    EXPECTATION_LIMIT,
    PURE_FUNCTIONS,
)


def check_names(policy: ir.Policy) -> tuple[Diagnostic, ...]:
    """Checks a policy without a model. This function does not raise.

    `parse` does the same for texts, so this is for policies from JSON or Python.

    Returns:
        The errors and warnings, with the spans of the nodes.
    """
    return tuple(finding.diagnostic for finding in judge(policy))


def judge(policy: ir.Policy, broken: frozenset[str] = frozenset(), *, partial: bool = False) -> list[Finding]:
    """Checks a policy without a model.

    Args:
        policy: The policy.
        broken: Names that are declared by statements with syntax errors.
        partial: Whether statements are missing, so that unused names cannot be determined.

    Returns:
        The findings of `check_names`, with the words that they refer to.
    """
    report = Report()
    if not within_bounds(policy, report):
        return report.findings
    judge_shapes(policy, report)
    if report.findings:
        # The other checks rely on the structure.
        return report.findings
    scope = scope_of(policy, report, broken)
    judgement = _Judgement(scope, report, Checker(scope, report, policy.source))
    judgement.checker.declare()
    for statement in policy.statements:
        judgement.statement(statement)
    if not report.findings:
        advise(policy, scope, report, partial=partial)
    return report.findings


@dataclass
class _Judgement:
    scope: Scope
    report: Report
    checker: Checker
    masks: set[str] = field(default_factory=set[str])
    presets: set[str] = field(default_factory=set[str])

    def statement(self, statement: ir.Statement) -> None:
        match statement:
            case ir.Param():
                self._param(statement)
            case ir.Let() | ir.Table() | ir.External():
                # Lets and tables are checked by `Checker.declare`.
                pass
            case ir.Signal():
                self._selectors(statement.value)
            case ir.Rule():
                self._rule(statement)
            case ir.Use():
                self._settings(statement.settings, SETTING)
                if statement.when is not None:
                    self.checker.expect(statement.when, "boolean", WHEN)
                if statement.bound is not None:
                    self.checker.count(WholeNumber(statement.bound.count, "`at most`", BOUND, 0, off=True))
            case ir.Preset():
                self._preset(statement)
            case ir.Expect():
                self._expect(statement)
            case ir.Tuned():
                self._tuned(statement)
            case _:
                assert_never(statement)

    def _selectors(self, expression: ir.Expression) -> None:
        """Checks the selectors of the probes and of `over` in an expression."""
        for node in walk(expression):
            if isinstance(node, ir.Over) or (isinstance(node, ir.Probe) and not is_itself(node.selector, self.checker)):
                judge_selector(node.selector, self.checker)

    # --- parameters

    def _param(self, param: ir.Param) -> None:
        before = len(self.report.findings)
        if param.default is not None and not isinstance(param.default, ir.Off):
            self._constant(param.default, LITERAL)
        if param.domain is not None:
            self._domain(param, param.domain)
        if len(self.report.findings) > before or param.default is None:
            return
        self._typed(param, param.default)

    def _typed(self, param: ir.Param, value: ir.Expression) -> None:
        """Checks that a value has the type of a parameter and lies in its domain."""
        try:
            typed(param, value)
        except PolicyError as error:
            for finding in error.diagnostics:
                self.report.adopt(finding, value)

    def _constant(self, node: ir.Expression, context: ExpressionPlace) -> None:
        """Checks a default or a setting. Lists of strings and intervals are allowed."""
        items = node.items if isinstance(node, ir.ListOf) else (node,)
        for item in items:
            self.checker.infer(item, context)

    def _domain(self, param: ir.Param, domain: ir.Interval | ir.SetOf) -> None:
        self.checker.infer(domain, LITERAL)
        if isinstance(domain, ir.Interval) and param.type in ("string", "bool"):
            help = 'name the values: `in {"a", "b"}`' if param.type == "string" else None
            self.report.add("E111", f"a `{param.type}` has no interval for a domain", domain, help=help)

    # --- rules

    def _rule(self, rule: ir.Rule) -> None:
        judge_selector(rule.selector, self.checker)
        if rule.when is not None:
            self.checker.expect(rule.when, "boolean", WHEN)
        if rule.schedule is not None:
            self._schedule(rule.schedule)
        if rule.condition is not None:
            self.checker.expect(rule.condition, "boolean", WHILE)
            self._selectors(rule.condition)
        for count in counts_of(rule):
            self.checker.count(count)
        scopes = [bound.scope for bound in rule.bounds]
        for number, bound in enumerate(rule.bounds):
            if bound.scope in scopes[:number]:
                bound_name = "in a row" if bound.scope == "row" else "in all"
                self.report.add("E020", f"a rule has one `at most ... {bound_name}`", bound)
        self._action(rule.action)
        self._model(rule)

    def _schedule(self, schedule: ir.ScheduleClause) -> None:
        match schedule:
            case ir.OnSteps(steps=ir.Name() as name):
                self._param_of(name, "list", "`on`")
            case ir.Mask(mask=ir.Text() as mask):
                self._mask(mask)
            case ir.Mask(mask=ir.Name() as name, by_site=True):
                self._param_of(name, "list", "`mask ... by site`")
            case ir.Mask(mask=ir.Name() as name):
                self._param_of(name, "string", "`mask`")
                param = self.scope.param(name.name)
                if param and isinstance(param.default, ir.Text) and name.name not in self.masks:
                    self.masks.add(name.name)
                    self._mask(param.default)
            case _:
                # Counts are checked with those of the bounds. Lists and `off` are here only after substitution.
                pass

    def _param_of(self, name: ir.Name, wanted: ir.ParamType, clause: str) -> None:
        """Checks that `name` is a parameter of the type `wanted`."""
        sort, param = self.scope.sort(name.name), self.scope.param(name.name)
        if sort is None:
            self.checker.unknown(name, name.name, frozenset({"parameter"}), type_=wanted)
        elif sort != "unknown" and (param is None or param.type != wanted):
            actual = f"`{param.type}` parameter" if param else sort
            self.report.add("E110", f"{clause} takes a `{wanted}` parameter, and `{name.name}` is a {actual}", name)

    def _mask(self, mask: ir.Text) -> None:
        if not bare_mask(mask.value) or not is_mask(mask.value):
            help = "one letter per step: 1 computes, 0 reuses"
            self.report.add("E118", "a mask has no letters but 0 and 1", mask, help=help)

    def _model(self, rule: ir.Rule) -> None:
        """Checks actions and clauses that are valid only, or never, in a rule on the whole model."""
        if isinstance(rule.action, ir.ApproximateUncond) and rule.selector != ir.OfKind(of="model"):
            help = "write `match model ... -> approximate uncond ...`"
            self.report.add("E123", "`approximate uncond` acts on the whole model", rule.selector, help=help)
        if not takes_model(rule.selector):
            return
        for clause in (rule.when, rule.schedule, rule.condition, *rule.bounds):
            if clause is not None and "uncond_skipped" in self.scope.clock_of(clause):
                message = "a rule on `model` cannot read `uncond_skipped`, because it is decided after the rule"
                self.report.add("E122", message, clause, word="uncond_skipped")

    # --- actions

    def _action(self, action: ir.Action) -> None:
        match action:
            case ir.Compute() | ir.Skip() | ir.Reuse():
                pass
            case ir.Predict():
                self.checker.check_predictor(action, action.predictor, action.arguments)
            case ir.ApproximateUncond():
                self._approximation(action)
            case _:
                assert_never(action)

    def _approximation(self, action: ir.ApproximateUncond) -> None:
        labels = APPROXIMATIONS.get(action.method)
        if labels is None:
            help = suggestion(action.method, list(APPROXIMATIONS))
            message = f"there is no approximation `{action.method}`"
            self.report.add("E107", message, action, help=help, word=action.method)
        else:
            self.checker.check_labels(action, action.method, action.arguments, labels, ARGUMENT)

    # --- settings

    def _settings(self, settings: tuple[ir.Setting, ...], context: ExpressionPlace) -> None:
        seen = set[str]()
        for setting in settings:
            if setting.name in seen:
                self.report.add("E102", f"`{setting.name}` is set twice", setting, word=setting.name)
            seen.add(setting.name)
            passed_on = isinstance(setting.value, ir.Name) and self.scope.param(setting.value.name)
            if not isinstance(setting.value, ir.Off) and not (passed_on and context is SETTING):
                self._constant(setting.value, context)

    def _preset(self, preset: ir.Preset) -> None:
        if preset.name in self.presets:
            self.report.add("E102", f"the preset `{preset.name}` is declared twice", preset, word=preset.name)
        self.presets.add(preset.name)
        fault = regex_fault(preset.for_class)
        if fault is not None:
            self.report.adopt(fault, preset)
        # The names in the condition are entries of the model's configuration, which are not known here.
        for node in walk(preset.when) if preset.when is not None else ():
            pure = not isinstance(node, ir.Call) or node.function in PURE_FUNCTIONS
            if not pure or isinstance(node, ir.Probe | ir.Over | ir.Lookup):
                message = "the condition of a preset reads `width`, `depth` and the model's configuration only"
                self.report.add("E113", message, node)
        self._settings(preset.settings, LITERAL)
        for setting in preset.settings:
            param = self.scope.param(setting.name)
            if param is None and self.scope.sort(setting.name) != "unknown":
                help = self.scope.near(setting.name, frozenset({"parameter"}))
                message = f"the policy has no parameter `{setting.name}`"
                self.report.add("E101", message, setting, help=help, word=setting.name)
            elif param is not None:
                self._typed(param, setting.value)

    def _expect(self, expect: ir.Expect) -> None:
        judge_selector(expect.selector, self.checker)
        if not 1 <= expect.steps <= EXPECTATION_LIMIT:
            self.report.add("E124", f"an expectation has 1 to {EXPECTATION_LIMIT} steps, not {expect.steps}", expect)
        elif len(expect.row) != expect.steps:
            message = f"the row has {counted(len(expect.row), 'letter')} for {counted(expect.steps, 'step')}"
            help = "one letter per step: `C` computes, `R` reuses"
            self.report.add("E117", message, expect, help=help)
        self._settings(expect.settings, EXPECTED)
        for setting in expect.settings:
            self._expected(setting, expect.steps)

    def _tuned(self, tuned: ir.Tuned) -> None:
        if not 1 <= tuned.steps <= EXPECTATION_LIMIT:
            self.report.add("E124", f"`tuned` takes 1 to {EXPECTATION_LIMIT} steps, not {tuned.steps}", tuned)
        self._settings(tuned.settings, LITERAL)

    def _expected(self, setting: ir.Setting, steps: int) -> None:
        sort = self.scope.sort(setting.name)
        if sort is None or sort in ("function", "table", "let"):
            help = self.scope.near(setting.name, _SETTABLE)
            message = f"`{setting.name}` is a {sort}" if sort else f"the name `{setting.name}` is not declared"
            code = "E110" if sort else "E101"
            self.report.add(code, message, setting, help=help, word=setting.name, once=setting.name)
        items = setting.value.items if isinstance(setting.value, ir.ListOf) else ()
        if sort in ("clock word", "signal", "external") and items and len(items) != steps:
            message = f"`{setting.name}` has {counted(len(items), 'value')} for {counted(steps, 'step')}"
            self.report.add("E117", message, setting.value)


_SETTABLE: frozenset[Sort] = frozenset({"clock word", "signal", "external", "parameter"})
