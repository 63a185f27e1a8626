// Sorting, filtering and the two viewers. All text of runs goes in as textContent, never as HTML.
"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse($("#data").textContent);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// ---- the table: sort by a column, filter by words, hide groups of columns

function sortable(table) {
  const body = $("tbody.rows", table);
  const original = [...body.rows];
  for (const head of $$("thead th[data-better]", table)) {
    $("button", head).addEventListener("click", () => {
      const column = head.cellIndex;
      // First the best on top, then the worst, then as it was.
      const better = Number(head.dataset.better) > 0 ? "descending" : "ascending";
      const worse = better === "descending" ? "ascending" : "descending";
      const before = head.getAttribute("aria-sort");
      const now = before === better ? worse : before === worse ? null : better;
      for (const other of $$("thead th[aria-sort]", table)) other.removeAttribute("aria-sort");
      if (now) head.setAttribute("aria-sort", now);
      const sign = now === "ascending" ? 1 : -1;
      const key = (row) => row.cells[column].dataset.v;
      const rows = now
        ? [...original].sort((a, b) => {
            const [x, y] = [key(a), key(b)];
            if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
            return sign * (column ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
          })
        : original;
      body.append(...rows);
    });
  }
}

function filterable(input, items, textOf, output, noun) {
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items()) {
      const text = textOf(item).toLowerCase();
      item.hidden = !words.every((word) => text.includes(word));
      shown += !item.hidden;
    }
    const all = items().length;
    output.textContent = shown === all ? `${all} ${noun}` : `${shown} of ${all} ${noun}`;
  };
  input.addEventListener("input", apply);
  apply();
}

const results = $("#results table");
if (results) {
  sortable(results);
  filterable($("#filter-rows"), () => $$("tbody.rows tr", results), (row) => row.cells[0].textContent, $("#count-rows"), "rows");
  for (const box of $$("input[data-group]")) {
    box.addEventListener("change", () => {
      for (const cell of $$(`[data-g="${box.dataset.group}"]`, results)) cell.hidden = !box.checked;
    });
  }
  const gaps = $("#show-gaps");
  if (gaps) gaps.addEventListener("change", () => results.classList.toggle("no-gaps", !gaps.checked));
}
const runs = $("#runs .runs");
if (runs) filterable($("#filter-runs"), () => $$(":scope > details", runs), (run) => $("summary b", run).textContent, $("#count-runs"), "runs");

function options(select, indices) {
  select.replaceChildren(...indices.map((index) => make("option", { value: index, text: data.runs[index].title })));
}

// ---- sample answers

const chooser = $("#sample-run");
if (chooser) {
  options(chooser, data.runs.flatMap((run, index) => (run.samples.length ? [index] : [])));
  const show = () => {
    const run = data.runs[Number(chooser.value)];
    $("#samples").replaceChildren(
      ...run.samples.map((sample) => {
        const answer = (title, text) => make("div", {}, make("h4", { text: title }), make("p", { text: text || "(nothing)" }));
        return make(
          "article", { class: "card sample" }, make("h3", { text: sample.question }),
          make("p", { class: "accepted", text: `Accepted: ${sample.answers.join(" · ")}` }),
          make("div", { class: "pair" }, answer("Base model", sample.base), answer("Tuned", sample.tuned)),
        );
      }),
    );
  };
  chooser.addEventListener("change", show);
  show();
}

// ---- KL of one example, token by token

const panes = $$("#tokens .pane");
const ROLES = ["template", "document", "question", "response"];

function pane(root, chosen) {
  const select = $("select", root), text = $(".text", root), readout = $(".readout", root);
  options(select, data.runs.flatMap((run, index) => (run.kl ? [index] : [])));
  select.value = String(chosen);
  let tokens = [], now = -1;

  const said = (index) => {
    const { texts, roles, kl } = tokens;
    const value = kl[index] === null ? "no row: nothing follows" : `${kl[index]} nats`;
    const next = kl[index] === null ? "" : `, predicting ${JSON.stringify(texts[index + 1] ?? "")}`;
    return `${JSON.stringify(texts[index])} (${roles[index]}): ${value}${next}`;
  };
  const point = (index) => {
    if (tokens.nodes[now]) tokens.nodes[now].classList.remove("now");
    now = index;
    tokens.nodes[now].classList.add("now");
    readout.textContent = said(now);
  };
  const draw = (scale) => {
    const run = data.runs[Number(select.value)], example = data.examples[run.kl.example];
    tokens = { texts: example.tokens, roles: example.roles, kl: run.kl.values, nodes: [] };
    now = -1;
    readout.textContent = "Point at a token, or focus the text and use the arrow keys.";
    const parts = [];
    let segment = null;
    example.tokens.forEach((token, index) => {
      const role = example.roles[index];
      if (role === "gap") {
        parts.push(make("span", { class: "gap-mark", text: `… ${token} tokens left out …` }));
        tokens.nodes.push(null);
        segment = null;
        return;
      }
      if (role !== segment) parts.push(make("span", { class: `mark ${role}`, text: role, "aria-hidden": "true" }));
      segment = role;
      const node = make("i", { class: role, text: token, "data-i": index });
      const value = run.kl.values[index];
      if (token.includes("\n")) node.classList.add("line");
      node.style.setProperty("--v", value === null ? 0 : Math.min(1, Math.sqrt(value / scale)).toFixed(3));
      if (role !== "response" && example.roles[index + 1] === "response") node.classList.add("boundary");
      if (value !== null) node.title = `KL ${value} nats, ${role}${node.classList.contains("boundary") ? ", boundary row" : ""}`;
      tokens.nodes.push(node);
      parts.push(node);
    });
    text.replaceChildren(...parts);
    const rows = ROLES.map((role) => [role, run.kl.values.filter((v, i) => v !== null && example.roles[i] === role)]);
    const cells = ([role, values]) => make(
      "tr", {}, make("th", { scope: "row", class: role }, make("span", { class: "swatch" }), role),
      make("td", { text: values.length }),
      make("td", { text: (values.reduce((a, b) => a + b, 0) / values.length).toPrecision(3) }),
    );
    $(".byrole tbody", root).replaceChildren(...rows.filter(([, values]) => values.length).map(cells));
  };
  text.addEventListener("pointerover", (event) => event.target.dataset.i && point(Number(event.target.dataset.i)));
  text.addEventListener("click", (event) => event.target.dataset.i && point(Number(event.target.dataset.i)));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    let next = now + step;
    while (next >= 0 && next < tokens.nodes.length && !tokens.nodes[next]) next += step;
    if (next < 0 || next >= tokens.nodes.length) return;
    point(next);
    tokens.nodes[next].scrollIntoView({ block: "nearest" });
  });
  return { select, draw };
}

if (panes.length) {
  const shown = panes.map((root) => pane(root, Number(root.dataset.run)));
  const draw = () => {
    // One scale for both panes, or their colours could not be compared. The largest of all but the top 1%.
    const values = shown.flatMap(({ select }) => data.runs[Number(select.value)].kl.values).filter((v) => v !== null);
    values.sort((a, b) => a - b);
    const scale = values[Math.floor(0.99 * (values.length - 1))] || 1e-9;
    $("#scale-top").textContent = `${scale.toPrecision(2)} nats and more`;
    for (const one of shown) one.draw(scale);
  };
  for (const { select } of shown) select.addEventListener("change", draw);
  draw();
}
