"use strict";
(() => {
  const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];
  const size = (value) => {
    let unit = 0;
    while (Math.abs(value) >= 999.5 && unit < UNITS.length - 1) { value /= 1000; unit += 1; }
    return `${Number(value.toPrecision(3))} ${UNITS[unit]}`;
  };
  const number = (value) => {
    const large = Math.abs(value);
    if (value === 0) return "0";
    if (large >= 1e9 || large < 1e-3) return value.toExponential(2);
    return large >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
  };
  const shown = (value, kind) =>
    kind === "bytes" ? size(value) : kind === "share" ? `${(100 * value).toFixed(1)}%` : number(value);

  /** The index of the value in rising `xs` that is nearest to x. */
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  /** Show everything of one trial together: its row, its curves. */
  let lit = null;
  const light = (trial) => {
    if (trial === lit) return;
    for (const one of document.querySelectorAll(".on")) one.classList.remove("on");
    lit = trial;
    if (trial === null) return;
    for (const one of document.querySelectorAll(`[data-trial="${Number(trial)}"]`)) one.classList.add("on");
  };

  const follow = (figure) => {
    const plot = figure.querySelector(".plot");
    const source = figure.querySelector('script[type="application/json"]');
    if (!plot || !source) return;
    const chart = JSON.parse(source.textContent);
    const [left, right] = chart.x, [bottom, top] = chart.y;
    const cursor = document.createElement("div"), tip = document.createElement("div");
    cursor.className = "cursor";
    tip.className = "tip";
    tip.setAttribute("aria-live", "polite");
    cursor.hidden = tip.hidden = true;
    plot.append(cursor, tip);
    const many = chart.lines.length > 8;
    const place = (value) =>
      chart.log ? Math.log(value / bottom) / Math.log(top / bottom) : (value - bottom) / (top - bottom);
    const steps = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    let at = null;

    const row = (line, index) => {
      const entry = document.createElement("div"), mark = document.createElement("i"), value = document.createElement("b");
      mark.style.background = `var(--c${many ? 1 : line.colour})`;
      value.textContent = shown(line.y[index], chart.kind);
      entry.append(mark, `${line.name} `, value);
      return entry;
    };
    const show = (step, height) => {
      at = step;
      let found = chart.lines.map((line) => [line, nearest(line.x, step)]);
      const gap = Math.max(0.5, (right - left) / 80);
      found = found.filter(([line, index]) => Math.abs(line.x[index] - step) <= gap);
      if (!found.length) { hide(); return; }
      if (many || height !== null) {
        const far = ([line, index]) => Math.abs(place(line.y[index]) - (height ?? 0.5));
        const closest = found.reduce((one, other) => (far(other) < far(one) ? other : one));
        if (closest[0].trial !== null) light(closest[0].trial);
        if (many) found = [closest];
      }
      const across = (step - left) / (right - left);
      const here = chart.words[step] ?? step.toLocaleString("en-US");
      tip.replaceChildren(`${chart.name} ${here}`, ...found.map(([line, index]) => row(line, index)));
      cursor.style.left = `${100 * across}%`;
      tip.style.left = across <= 0.5 ? `calc(${100 * across}% + 10px)` : "auto";
      tip.style.right = across > 0.5 ? `calc(${100 * (1 - across)}% + 10px)` : "auto";
      cursor.hidden = tip.hidden = false;
    };
    const hide = () => { cursor.hidden = tip.hidden = true; light(null); };
    const read = (event) => {
      const box = plot.getBoundingClientRect();
      const across = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      show(steps[nearest(steps, left + across * (right - left))], 1 - (event.clientY - box.top) / box.height);
    };
    plot.addEventListener("pointermove", read);
    plot.addEventListener("pointerdown", read);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      const index = at === null ? (by > 0 ? -1 : steps.length) : steps.indexOf(at);
      show(steps[Math.min(steps.length - 1, Math.max(0, index + by))], null);
    });
  };

  const sortable = (table) => {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (line) => line.cells[column].dataset.key ?? line.cells[column].textContent;
        const compare = (one, other) => {
          const [a, b] = [key(one), key(other)];
          if (a === "" || b === "") return (a === "") - (b === "");
          const [x, y] = [Number(a), Number(b)];
          const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
          return down ? -order : order;
        };
        body.append(...[...body.rows].sort(compare));
      });
    });
  };

  document.querySelectorAll(".chart").forEach(follow);
  document.querySelectorAll("table.sortable").forEach(sortable);
  for (const one of document.querySelectorAll("[data-trial]")) {
    one.addEventListener("pointerenter", () => light(one.dataset.trial));
    one.addEventListener("pointerleave", () => light(null));
  }
  // What is folded away would be missing on paper.
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not([open])")) {
      one.open = true;
      addEventListener("afterprint", () => { one.open = false; }, { once: true });
    }
  });
})();
