// What the page adds where scripts run: values under the pointer, series that can be hidden, logarithmic axes, and the
// last quarter of the x axis. Without it the charts stand as they are.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const make = (parent, name, attributes, text) => {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const words = value => {
    const size = Math.abs(value);
    const short = value => value.toExponential(3).replace(/\.?0*e\+?/, "e");
    const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? short(value) : String(Number(value.toPrecision(5)));
    return text.replace("-", "−");
  };

  // Round numbers within an axis.
  const steps = (axis, most) => {
    if (axis.log) {
      const [first, last] = [Math.floor(Math.log10(axis.low)), Math.ceil(Math.log10(axis.high))];
      for (const [factors, stride] of [[[1, 2, 5], 1], [[1, 3], 1], [[1], 1], [[1], 2], [[1], 5], [[1], 20], [[1], 100]]) {
        const found = [];
        for (let power = first; power <= last; power++)
          if (power % stride === 0)
            for (const factor of factors) found.push(Number(`${factor}e${power}`));
        const inside = found.filter(value => value >= axis.low && value <= axis.high);
        if (inside.length > 1 && inside.length <= most) return inside;
      }
    }
    const power = 10 ** Math.floor(Math.log10((axis.high - axis.low) / most));
    for (const factor of [1, 2, 5, 10, 20]) {
      const step = factor * power, first = Math.ceil(axis.low / step), count = Math.floor(axis.high / step) - first;
      if (count < most) {
        const all = Array.from({ length: Math.max(0, count + 1) }, (_, index) => (first + index) * step);
        return axis.whole ? all.filter(Number.isInteger) : all;
      }
    }
    return [];
  };
  const scale = (axis, from, to) => {
    const of = axis.log ? Math.log : value => value;
    const [low, high] = [of(axis.low), of(axis.high)];
    return value => from + (to - from) * (of(value) - low) / (high - low);
  };
  // Those whose labels fit beside each other on an axis of this length. A digit is about 7 wide.
  const beside = (axis, length) => {
    const place = scale(axis, 0, length), width = value => 7 * words(value).length;
    const fit = (value, index, all) =>
      index === 0 || place(value) - place(all[index - 1]) >= (width(value) + width(all[index - 1])) / 2 + 5;
    for (let most = Math.floor(length / 44); most > 1; most--) {
      const found = steps(axis, most);
      if (found.every(fit)) return found;
    }
    return steps(axis, 1).slice(0, 1);
  };

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = JSON.parse(figure.dataset.chart);
    const svg = figure.querySelector("svg"), { left, top, right, bottom } = chart.panel;
    const state = { hidden: new Set(), log: chart.y.log, late: false };
    let x = chart.x, y = chart.y;

    // The moving average of the values that a line was made of, over so many of them, or over the line's own number.
    const smooth = (line, window) => {
      const parts = line.parts, { raw, band } = line.given;
      const values = parts.map(([at, mean]) => [at, mean]);
      if (window === 1) return Object.assign(line, { points: values, raw: [], band });
      const places = [];
      let before = 0;
      for (const [, , count] of parts) {
        places.push(before + (count - 1) / 2);
        before += Math.max(count, 1);
      }
      const half = (window - 1) / 2, points = [];
      let [first, last, sum, total] = [0, 0, 0, 0];
      for (let index = 0; index < parts.length; index++) {
        for (; last < parts.length && places[last] <= places[index] + half; last++)
          if (parts[last][2]) { sum += parts[last][1] * parts[last][2]; total += parts[last][2]; }
        for (; places[first] < places[index] - half; first++)
          if (parts[first][2]) { sum -= parts[first][1] * parts[first][2]; total -= parts[first][2]; }
        points.push([parts[index][0], parts[index][2] ? sum / total : null]);
      }
      Object.assign(line, { points, raw: raw.length ? raw : values, band: [] });
    };
    const smoothAll = window => {
      for (const line of chart.lines) if (line.parts.length) smooth(line, window || line.window);
    };
    for (const line of chart.lines) line.given = { raw: line.raw, band: line.band };
    smoothAll(0);

    const shown = () => chart.lines.filter(line => !state.hidden.has(line.style));
    const inside = ([at, value]) => value !== null && at >= x.low && at <= x.high && (!state.log || value > 0);
    const fit = () => {
      const span = chart.x.high - chart.x.low;
      x = state.late ? { ...chart.x, low: chart.x.high - span / 4 } : chart.x;
      const ends = line => line.points.concat(line.raw, line.band.flatMap(([at, a, b]) => [[at, a], [at, b]]));
      const values = shown().flatMap(ends).filter(inside).map(([, value]) => value);
      if (!values.length) return;
      let [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
      if (low === high) [low, high] = low === 0 ? [-1, 1] : [low - 0.1 * Math.abs(low), high + 0.1 * Math.abs(high)];
      else if (state.log) [low, high] = [low * (low / high) ** 0.04, high * (high / low) ** 0.04];
      else {
        const margin = 0.05 * (high - low);
        [low, high] = [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
      }
      y = { ...chart.y, low, high, log: state.log };
    };
    const draw = () => {
      fit();
      svg.querySelectorAll(":scope > :not(title)").forEach(node => node.remove());
      const [across, up] = [scale(x, left, right), scale(y, bottom, top)];
      const faint = { "font-size": 11, fill: "currentColor", "fill-opacity": 0.72 };
      for (const value of steps(y, Math.floor((bottom - top) / 32))) {
        const at = up(value);
        make(svg, "path", { d: `M${left} ${at}L${right} ${at}`, stroke: "currentColor", "stroke-opacity": 0.11 });
        make(svg, "text", { ...faint, x: left - 6, y: at + 4, "text-anchor": "end" }, words(value));
      }
      for (const value of beside(x, right - left))
        make(svg, "text", { ...faint, x: across(value), y: bottom + 16, "text-anchor": "middle" }, words(value));
      make(svg, "path", { d: `M${left} ${bottom}L${right} ${bottom}`, stroke: "currentColor", "stroke-opacity": 0.45 });
      const middle = (top + bottom) / 2;
      make(svg, "text", { ...faint, x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle" }, x.label);
      make(svg, "text", { ...faint, x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, y.label);
      const path = points => {
        let text = "", pen = "M";
        for (const point of points) {
          if (!inside(point)) { pen = "M"; continue; }
          text += `${pen}${across(point[0]).toFixed(2)} ${up(point[1]).toFixed(2)}`;
          pen = "L";
        }
        return text;
      };
      for (const line of shown()) {
        const colour = `var(--series-${line.colour})`;
        const band = line.band.filter(([at, low, high]) => inside([at, low]) && inside([at, high]));
        if (band.length > 1) {
          const around = band.map(([at, low]) => [at, low]).concat(band.map(([at, , high]) => [at, high]).reverse());
          make(svg, "path", { d: path(around) + "Z", fill: colour, "fill-opacity": 0.16 });
        }
        const stroke = { fill: "none", stroke: colour, "stroke-linejoin": "round" };
        make(svg, "path", { ...stroke, d: path(line.raw), "stroke-width": 1, "stroke-opacity": 0.3 });
        make(svg, "path", { ...stroke, d: path(line.points), "stroke-width": 2, "stroke-dasharray": line.dash.join(" ") });
      }
    };

    const box = document.createElement("div");
    box.className = "values";
    box.hidden = true;
    figure.append(box);
    const rule = () => svg.querySelector(".rule") ?? make(svg, "path", { class: "rule", stroke: "currentColor", "stroke-opacity": 0.5 });
    const leave = () => { box.hidden = true; svg.querySelector(".rule")?.remove(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", event => {
      const frame = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / frame.width;
      const share = ((event.clientX - frame.left) * unit - left) / (right - left);
      if (share < -0.02 || share > 1.02) return leave();
      const wanted = x.low + share * (x.high - x.low);
      let nearest = null;
      for (const line of shown())
        for (const point of line.points)
          if (inside(point) && (nearest === null || Math.abs(point[0] - wanted) < Math.abs(nearest - wanted))) nearest = point[0];
      if (nearest === null) return leave();
      const at = scale(x, left, right)(nearest);
      rule().setAttribute("d", `M${at} ${top}L${at} ${bottom}`);
      box.replaceChildren();
      const add = text => { const row = document.createElement("div"); row.textContent = text; box.append(row); return row; };
      add(`${x.label} ${words(nearest)}`);
      for (const line of shown()) {
        const point = line.points.find(([where]) => where === nearest);
        if (point && point[1] !== null) add(`${line.name}: ${words(point[1])}`).style.borderColor = `var(--series-${line.colour})`;
      }
      box.hidden = false;
    });

    const bar = document.createElement("div");
    bar.className = "tools";
    const button = (text, change) => {
      const node = document.createElement("button");
      node.type = "button";
      node.textContent = text;
      node.setAttribute("aria-pressed", "false");
      node.addEventListener("click", () => {
        node.setAttribute("aria-pressed", String(change()));
        leave();
        draw();
      });
      bar.append(node);
      return node;
    };
    const positive = chart.lines.some(line => line.points.some(([, value]) => value !== null && value > 0));
    if (positive) button("log", () => (state.log = !state.log)).setAttribute("aria-pressed", String(state.log));
    if (chart.x.whole && chart.lines.some(line => line.points.length > 7)) button("last quarter", () => (state.late = !state.late));
    if (bar.children.length) figure.append(bar);
    figure.addEventListener("smooth", event => {
      smoothAll(event.detail);
      leave();
      draw();
    });
    figure.addEventListener("series", event => {
      const { style, hide } = event.detail;
      hide ? state.hidden.add(style) : state.hidden.delete(style);
      draw();
    });
  }

  // One control smooths all curves of steps.
  const smoothed = [...document.querySelectorAll("figure[data-chart]")].filter(figure =>
    JSON.parse(figure.dataset.chart).lines.some(line => line.parts.length > 2));
  for (const section of new Set(smoothed.map(figure => figure.closest("section")))) {
    const figures = smoothed.filter(figure => section.contains(figure));
    const lines = figures.flatMap(figure => JSON.parse(figure.dataset.chart).lines);
    const longest = Math.max(...lines.map(line => line.parts.reduce((sum, [, , count]) => sum + count, 0)));
    const label = document.createElement("label"), select = document.createElement("select");
    label.className = "smoothing";
    const choices = [3, 5, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001].filter(window => window < longest);
    const usual = lines.some(line => line.window > 1);
    for (const [value, text] of [...(usual ? [[0, "a fiftieth of the"]] : []), [1, "single"], ...choices.map(window => [window, window])])
      select.append(new Option(text, value));
    select.addEventListener("change", () =>
      figures.forEach(figure => figure.dispatchEvent(new CustomEvent("smooth", { detail: Number(select.value) }))));
    label.append("Moving average over ", select, " points");
    section.querySelector(".charts").before(label);
  }

  // A legend hides and shows a group in all charts of its section.
  for (const legend of document.querySelectorAll(".legend")) {
    const figures = legend.closest("section").querySelectorAll("figure[data-chart]");
    if (!figures.length) continue;
    for (const item of legend.querySelectorAll("li")) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...item.childNodes);
      button.setAttribute("aria-pressed", "true");
      item.append(button);
      button.addEventListener("click", () => {
        const hide = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", String(!hide));
        const detail = { style: Number(item.dataset.series), hide };
        figures.forEach(figure => figure.dispatchEvent(new CustomEvent("series", { detail })));
      });
    }
  }
})();
