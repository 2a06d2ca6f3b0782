"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displayModeBar: false, displaylogo: false };

  // ---- charts: "$name" is a colour of the page, which light and dark differ in
  function painted(value, style) {
    if (typeof value === "string") return value[0] === "$" ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.map((each) => painted(each, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, painted(each, style)]));
  }
  function draw(name) {
    const style = getComputedStyle(document.documentElement);
    const figure = painted(data.figures[name], style);
    return Plotly.react("chart-" + name, figure.data, figure.layout, config);
  }
  const idle = () => new Promise((done) => setTimeout(done));
  async function loadPlotly() {
    const text = atob(document.getElementById("plotly").textContent);
    const packed = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i); // a tenth of the time of Uint8Array.from
    const script = document.createElement("script");
    script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(script);
  }
  async function drawAll() {
    const names = [...document.querySelectorAll(".chart")].map((chart) => chart.id.replace("chart-", ""));
    await loadPlotly();
    for (const name of names) {
      await draw(name); // one at a time: the page answers in between
      performance.mark("chart " + name); // benchmarks/bench_report.py reads these
      if (name === "memory") follow();
      await idle();
    }
    performance.mark("drawn");
    dark.addEventListener("change", () => names.forEach(draw));
    document.documentElement.dataset.drawn = "yes";
  }

  // ---- what is alive at a moment
  const shown = matchMedia("(max-width: 640px)").matches ? 6 : 10;
  function human(bytes) {
    for (const unit of ["B", "KiB", "MiB"]) {
      if (bytes < 1024) return unit === "B" ? `${bytes} B` : `${bytes.toFixed(1)} ${unit}`;
      bytes /= 1024;
    }
    return `${bytes.toFixed(2)} GiB`;
  }
  function element(name, text, className) {
    const made = document.createElement(name);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }
  function keyCell(key) {
    const made = element("th", "");
    for (const part of key.split(/(?<=[./])/)) made.append(part, document.createElement("wbr"));
    return made;
  }
  function aliveTable(title, found, moment) {
    const rows = found.segments.filter((s) => s[0] <= moment && moment <= s[1]).sort((a, b) => b[2] - a[2]);
    const total = rows.reduce((sum, s) => sum + s[2], 0);
    const table = document.createElement("table");
    table.append(element("caption", `${title}: ${human(total)} alive`));
    for (const [, , bytes, key, role] of rows.slice(0, shown)) {
      const row = table.insertRow();
      row.append(keyCell(found.keys[key]), element("td", found.roles[role]));
      const size = element("td", human(bytes), "number");
      size.style.setProperty("--share", `${(100 * bytes) / rows[0][2]}%`);
      row.append(size);
    }
    const rest = rows.slice(shown);
    if (rest.length) {
      const row = table.insertRow();
      row.append(element("th", `and ${rest.length} more`), element("td", ""));
      row.append(element("td", human(rest.reduce((sum, s) => sum + s[2], 0)), "number"));
    }
    return table;
  }
  function show(moment) {
    document.getElementById("moment").textContent = data.alive.words[moment];
    document.getElementById("alive").replaceChildren(
      aliveTable("all in fp32", data.alive.before, moment),
      aliveTable("under the plan", data.alive.after, moment),
    );
  }
  function follow() {
    const last = data.alive.words.length - 1;
    const point = (event) => show(Math.min(event.points[0].pointNumber, last));
    const chart = document.getElementById("chart-memory");
    chart.on("plotly_hover", point);
    chart.on("plotly_click", point);
  }
  show(data.alive.peak);

  // ---- the table of tensors: search, choose, sort
  const table = document.getElementById("tensors");
  const rows = [...table.tBodies[0].rows];
  const [search, role, format] = ["search", "role", "format"].map((id) => document.getElementById(id));
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    let bytes = 0;
    for (const row of rows) {
      const key = row.cells[0].textContent.toLowerCase();
      row.hidden = !(
        words.every((word) => key.includes(word)) &&
        (!role.value || row.dataset.role === role.value) &&
        (!format.value || row.dataset.format === format.value)
      );
      if (!row.hidden) {
        count += 1;
        bytes += Number(row.dataset.bytes);
      }
    }
    document.getElementById("shown").textContent = `${count} of ${rows.length} tensors, ${human(bytes)}`;
  }
  function sort(column, header) {
    const numbers = header.classList.contains("number");
    const now = header.getAttribute("aria-sort");
    const up = now === "none" ? !numbers : now === "descending";
    const value = (row) => (numbers ? Number(row.cells[column].dataset.value) : row.cells[column].textContent);
    rows.sort((a, b) => (numbers ? value(a) - value(b) : value(a).localeCompare(value(b))) * (up ? 1 : -1));
    for (const other of header.parentNode.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  }
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sort(column, header));
  });
  [search, role, format].forEach((field) => field.addEventListener("input", filter));
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  filter();
  sort(2, table.tHead.rows[0].cells[2]);

  performance.mark("tables");
  if ("DecompressionStream" in window) idle().then(drawAll); // the tables answer first
  else document.getElementById("old").hidden = false;
})();
