(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const style = (element) => getComputedStyle(element);
  const touch = matchMedia("(hover: none)").matches;
  const config = { responsive: true, displayModeBar: false };
  const drawn = new Map(); // a chart's element to what draws it again

  // The figure in the page's colours; those of lines and bars are named by tone.
  function themed({ data, layout }) {
    const css = style(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const [ink, rule, panel] = ["--ink", "--rule", "--panel"].map(colour);
    const traces = data.map((trace) => {
      if (trace.meta === undefined) return trace;
      const tone = colour(`--tone-${trace.meta.tone}`);
      const marker = { ...trace.marker, color: tone };
      if (trace.line === undefined) return { ...trace, marker };
      return { ...trace, marker, line: { ...trace.line, color: tone } };
    });
    const axes = Object.keys(layout).filter((key) => /^[xy]axis/.test(key));
    const lined = axes.map((key) => [key, { gridcolor: rule, linecolor: rule, ...layout[key] }]);
    return [traces, {
      ...layout,
      ...Object.fromEntries(lined),
      dragmode: touch ? false : "zoom",
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: style(document.body).fontFamily, size: 12 },
      hoverlabel: { bgcolor: panel, bordercolor: rule, font: { color: ink } },
    }];
  }

  function draw(element, figure) {
    drawn.set(element, figure);
    return Plotly.react(element, ...themed(figure), config);
  }

  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        seen.unobserve(target);
        target.start();
      }
    }
  }, { rootMargin: "400px" });

  function later(element, start) {
    element.start = start;
    seen.observe(element);
  }

  // As Plotly takes a name: its brackets are no tags.
  const escaped = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;");

  const short = (name) => name.length > 16 ? `${name.slice(0, 15)}…` : name;

  function sixteenBits(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Uint16Array(bytes.buffer);
  }

  function matrix(box) {
    const m = read(box.dataset.matrix);
    const index = sixteenBits(m.index);
    const share = sixteenBits(m.share);
    const [map, overview, form, output] = [".map", ".overview", "form", "output"]
      .map((selector) => box.querySelector(selector));
    const place = new Map(m.order.map((filter, column) => [filter, column]));
    const count = m.classes.length;
    let first = 0; // class in the first row
    let shown = m.order; // filters in the columns
    let cell = [0, 0]; // under the keyboard

    // Class and share of what is kept of a filter, the largest first.
    const kept = (filter) => Array.from({ length: m.kept }, (_, rank) => {
      const at = filter * m.kept + rank;
      return [index[at], share[at] * m.scale / 65535];
    });
    const shareOf = (filter, klass) => (kept(filter).find(([own]) => own === klass) ?? [0, 0])[1];
    const chosenClass = () => form.elements.class.value === "" ? null : +form.elements.class.value;
    const chosenFilter = () => {
      const { value } = form.elements.filter;
      return value !== "" && place.has(+value) ? +value : null;
    };
    const text = (klass) => m.classes[klass];

    function figure() {
      const last = Math.min(first + m.window, count);
      const klass = chosenClass();
      const order = form.elements.order.value;
      shown = m.window < count
        ? m.order.filter((filter) => m.owner[filter] >= first && m.owner[filter] < last)
        : [...m.order];
      if (order === "number") shown.sort((a, b) => a - b);
      if (order === "share" && klass !== null) {
        const by = new Map(shown.map((filter) => [filter, shareOf(filter, klass)]));
        shown.sort((a, b) => by.get(b) - by.get(a));
      }
      const rows = m.classes.slice(first, last).map(escaped);
      const z = rows.map(() => new Float32Array(shown.length));
      shown.forEach((filter, column) => {
        for (const [own, value] of kept(filter)) {
          if (own >= first && own < last) z[own - first][column] = value;
        }
      });
      const [heat, sure, rest] = m.figure.data;
      const most = m.most.slice(first, last);
      const half = m.half.slice(first, last);
      const every = Math.ceil(rows.length / 40);
      const ticks = rows.map((_, row) => row).filter((row) => row % every === 0);
      const filter = chosenFilter();
      const accent = style(map).getPropertyValue("--accent").trim();
      const outline = (ends) => ({ type: "rect", line: { color: accent, width: 3 }, ...ends });
      const shapes = [];
      if (klass !== null && klass >= first && klass < last) {
        const row = klass - first;
        shapes.push(outline({ xref: "paper", x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5 }));
      }
      if (filter !== null && shown.includes(filter)) {
        const column = shown.indexOf(filter);
        shapes.push(outline({ yref: "paper", y0: 0, y1: 1, x0: column - 0.5, x1: column + 0.5 }));
      }
      const axis = {
        tickmode: "array",
        tickvals: ticks.map((row) => rows[row]),
        ticktext: ticks.map((row) => escaped(short(text(first + row)))),
        categoryorder: "array",
        categoryarray: rows,
      };
      const { layout } = m.figure;
      const columns = shown.map(String);
      return {
        data: [
          { ...heat, z, x: columns, y: rows },
          { ...sure, x: half, y: rows },
          { ...rest, x: most.map((value, row) => value - half[row]), y: rows },
        ],
        layout: {
          ...layout,
          shapes,
          height: 130 + Math.max(rows.length, 8) * 17,
          xaxis: { ...layout.xaxis, categoryorder: "array", categoryarray: columns },
          yaxis: { ...layout.yaxis, ...axis },
          yaxis2: { ...layout.yaxis2, ...axis },
        },
      };
    }

    function say() {
      const parts = [];
      const [filter, klass] = [chosenFilter(), chosenClass()];
      const listed = (pairs, name) => pairs
        .map(([key, value]) => `${name(key)} (${value.toFixed(3)})`).join(", ");
      if (filter !== null) {
        const largest = kept(filter).slice(0, 5).filter(([, value]) => value > 0);
        parts.push(largest.length
          ? `Filter ${filter} belongs most to ${listed(largest, text)}.`
          : `Filter ${filter} belongs to no class.`);
      } else if (form.elements.filter.value !== "") {
        parts.push(`There is no filter ${form.elements.filter.value}.`);
      }
      if (klass !== null) {
        const pairs = m.order.map((one) => [one, shareOf(one, klass)])
          .filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]).slice(0, 8);
        parts.push(`Class ${text(klass)} keeps most of ${m.most[klass]}`
          + ` ${m.most[klass] === 1 ? "filter" : "filters"}, of ${m.half[klass]}`
          + ` more than half; its surest are ${listed(pairs, String)}.`);
      }
      if (m.window < count) {
        parts.push(`Classes ${text(first)} to ${text(Math.min(first + m.window, count) - 1)}.`);
      }
      output.textContent = parts.join(" ");
    }

    function update() {
      say();
      return draw(map, figure());
    }

    function moveTo(klass) {
      const middle = klass - Math.floor(m.window / 2);
      first = Math.max(0, Math.min(middle, count - m.window));
    }

    form.addEventListener("submit", (event) => event.preventDefault());
    const react = ({ target }) => {
      if (target.name === "class" && chosenClass() !== null) moveTo(chosenClass());
      const filter = target.name === "filter" ? chosenFilter() : null;
      if (filter !== null && m.owner[filter] >= 0) moveTo(m.owner[filter]);
      update();
    };
    form.elements.filter.addEventListener("input", react);
    for (const name of ["class", "order"]) form.elements[name].addEventListener("change", react);
    for (const [name, step] of [["back", -m.window], ["on", m.window]]) {
      form.elements[name]?.addEventListener("click", () => {
        first = Math.max(0, Math.min(first + step, count - m.window));
        update();
      });
    }
    map.addEventListener("keydown", (event) => {
      const step = {
        ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      }[event.key];
      if (step === undefined || !shown.length) return;
      event.preventDefault();
      const rows = Math.min(m.window, count - first);
      cell = [
        Math.max(0, Math.min(cell[0] + step[0], rows - 1)),
        Math.max(0, Math.min(cell[1] + step[1], shown.length - 1)),
      ];
      Plotly.Fx.hover(map, { xval: cell[1], yval: cell[0] });
      const [filter, klass] = [shown[cell[1]], first + cell[0]];
      output.textContent = `Filter ${filter}, class ${text(klass)}:`
        + ` ${shareOf(filter, klass).toFixed(3)}.`;
    });
    later(map, update);
    if (overview) {
      later(overview, () => draw(overview, m.overview).then(() => {
        overview.on("plotly_click", ({ points }) => {
          moveTo(Math.round(points[0].y));
          update();
        });
      }));
    }
  }

  function confusion(box) {
    const { choices, complete, figure } = read(box.dataset.confusion);
    const charts = [...box.querySelectorAll(".chart")];
    const [form, output] = ["form", "output"].map((selector) => box.querySelector(selector));

    function axis(known, names) {
      const every = Math.ceil(names.length / 40);
      const ticks = names.filter((_, at) => at % every === 0);
      return {
        ...known,
        categoryorder: "array",
        categoryarray: names.map(escaped),
        tickmode: "array",
        tickvals: ticks.map(escaped),
        ticktext: ticks.map((name) => escaped(short(name))),
      };
    }

    function show(side) {
      const choice = choices[+form.elements.choice.value];
      output.textContent = choice.said;
      const counts = side === 1 ? choice.without : choice.complete ?? complete;
      const z = counts.map((row) => {
        const sum = row.reduce((total, count) => total + count, 0) || 1;
        return row.map((count) => count / sum);
      });
      const [y, x] = [choice.rows, choice.columns].map((names) => names.map(escaped));
      return draw(charts[side], {
        data: [{ ...figure.data[0], x, y, z, customdata: counts }],
        layout: {
          ...figure.layout,
          height: 140 + Math.max(12, y.length) * 17,
          xaxis: axis(figure.layout.xaxis, choice.columns),
          yaxis: axis(figure.layout.yaxis, choice.rows),
        },
      });
    }

    form.addEventListener("submit", (event) => event.preventDefault());
    form.elements.choice.addEventListener("change", () => charts.forEach((_, side) => show(side)));
    charts.forEach((chart, side) => later(chart, () => show(side)));
  }

  for (const element of document.querySelectorAll("[data-chart]")) {
    later(element, () => draw(element, read(element.dataset.chart)));
  }
  document.querySelectorAll("[data-matrix]").forEach(matrix);
  document.querySelectorAll("[data-confusion]").forEach(confusion);
  const again = () => drawn.forEach((figure, element) => draw(element, figure));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
})();
