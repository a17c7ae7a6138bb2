"use strict";
// Everything that is shown comes from the policy or the model and is put in as text, never as markup.
const known = JSON.parse(document.getElementById("data").textContent);

function element(name, className, ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

function describe(part, cell) {
  const row = known.rows[cell.parentElement.dataset.row];
  const [verdict, rule, reason, asked] = known.reasons[row.cells[cell.cellIndex - 1]];
  return {row, verdict, rule, reason: known.texts[reason], asked, rules: known.rules[part.dataset.part]};
}

function placeOf(cell) {
  const branch = cell.closest("[data-branch]");
  const step = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].textContent;
  return `step ${step}` + (branch.dataset.branch ? `, branch ${branch.dataset.branch}` : "");
}

function show(part, cell) {
  const {row, verdict, rule, reason, asked, rules} = describe(part, cell);
  const badge = element("span", `verdict ${cell.className}`, verdict);
  const rest = [];
  if (row.count > 1) rest.push(element("p", "values", `${row.count} sites are decided alike` + (row.same ? "." : "; the numbers are those of the first.")));
  const list = element("ol", "");
  for (const [number, outcome, clauses] of asked) {
    if (rule >= 0 && number > rule) continue;
    const lines = clauses.map(([holds, text, values]) => element("li", "",
      element("span", "sign", holds ? "yes" : "no"), " ", element("code", "", known.texts[text]),
      element("span", "values", known.texts[values] ? ` (${known.texts[values]})` : "")));
    const head = element("div", "", element("b", "", `Rule ${number + 1}`), ` ${known.texts[outcome]}`);
    head.append(element("div", "values", element("code", "", rules[number])));
    list.append(element("li", "", head, element("ul", "", ...lines)));
  }
  part.querySelector(".inspector").replaceChildren(
    element("div", "", element("p", "place", row.site), element("p", "values", placeOf(cell)), element("p", "", badge, reason), ...rest),
    list);
}

function label(part, cell) {
  const {verdict, rule, reason} = describe(part, cell);
  cell.setAttribute("aria-label", `${verdict}, ${rule < 0 ? "no rule" : `rule ${rule + 1}`}: ${reason}`);
  cell.setAttribute("aria-describedby", part.querySelector(".inspector").id);
}

function visible(table) {
  return [...table.tBodies].flatMap((body) => [...body.rows].filter((row) => !row.classList.contains("inner") || !body.classList.contains("closed")));
}

function focus(cell) {
  cell.tabIndex = 0; // only what has one can take the focus; the cell before loses its own
  cell.focus();
}

function walk(event, cell) {
  const rows = visible(cell.closest("table"));
  const [at, last] = [rows.indexOf(cell.parentElement), cell.parentElement.cells.length - 1];
  const control = event.ctrlKey || event.metaKey;
  let [row, column] = [at, cell.cellIndex];
  switch (event.key) {
    case "ArrowLeft": column -= 1; break;
    case "ArrowRight": column += 1; break;
    case "ArrowUp": row -= 1; break;
    case "ArrowDown": row += 1; break;
    case "PageUp": row = Math.max(0, row - 10); break;
    case "PageDown": row = Math.min(rows.length - 1, row + 10); break;
    case "Home": column = 1; if (control) row = 0; break;
    case "End": column = last; if (control) row = rows.length - 1; break;
    case "Enter": case " ": rows[row].querySelector("button")?.click(); event.preventDefault(); return;
    default: return;
  }
  event.preventDefault();
  const next = rows[row]?.cells[column];
  if (next?.matches("td")) focus(next);
}

function setUpGrid(part, table) {
  let current = table.querySelector("td");
  if (!current) return;
  current.tabIndex = 0;
  const chosen = table.querySelector("td.R") ?? table.querySelector("td.S");
  const choose = () => { if (chosen) { chosen.dataset.chosen = ""; show(part, chosen); } };
  if (!table.closest("[hidden]") && !part.querySelector("[data-chosen]")) choose();
  table.addEventListener("focusin", () => { if (chosen) delete chosen.dataset.chosen; });
  for (const body of table.tBodies) if (body.querySelector("button")) body.classList.add("closed");
  table.addEventListener("focusin", ({target}) => {
    if (!target.matches("td")) return;
    if (target !== current) current.removeAttribute("tabindex");
    current = target;
    show(part, current);
    label(part, current);
  });
  table.addEventListener("mousedown", (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    event.preventDefault();
    focus(cell);
  });
  table.addEventListener("mouseover", ({target}) => target.matches("td") && show(part, target));
  table.addEventListener("mouseleave", () => document.activeElement === current && show(part, current));
  table.addEventListener("keydown", (event) => event.target.matches("td") && walk(event, event.target));
  table.addEventListener("click", ({target}) => {
    if (!target.matches("button")) return;
    const open = !target.closest("tbody").classList.toggle("closed");
    target.setAttribute("aria-expanded", String(open));
  });
}

function setUp(part) {
  const chosen = (name) => part.querySelector(`input[name=${name}-${part.dataset.part}]:checked`)?.value;
  const branches = part.querySelectorAll("[data-branch]");
  const choose = () => {
    const branch = chosen("branch");
    if (branch !== undefined) for (const each of branches) each.hidden = each.dataset.branch !== branch;
  };
  const letter = () => {
    const rules = chosen("mode") === "rules";
    for (const cell of part.querySelectorAll(".grid td")) {
      const [, rule] = known.reasons[known.rows[cell.parentElement.dataset.row].cells[cell.cellIndex - 1]];
      cell.textContent = rules ? (rule < 0 ? "–" : rule + 1) : cell.className === "H" ? "·" : cell.className;
    }
  };
  part.addEventListener("change", ({target}) => target.name?.startsWith("mode") ? letter() : choose());
  choose();
  for (const table of part.querySelectorAll(".grid table")) setUpGrid(part, table);
}

for (const part of document.querySelectorAll("[data-part]")) setUp(part);
