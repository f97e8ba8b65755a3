"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const values = JSON.parse(document.getElementById("values").textContent);

  const plain = (value) => {
    for (const [size, letter] of [[1e9, "G"], [1e6, "M"]]) {
      if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(4))}${letter}`;
    }
    return String(Number(value.toPrecision(4)));
  };

  const draw = (parent, name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
  };

  // The point of a line that is next to a place, by bisection.
  const nearest = (line, across) => {
    let low = 0, high = line.at.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (line.at[middle][0] < across) low = middle; else high = middle;
    }
    return across - line.at[low][0] < line.at[high][0] - across ? low : high;
  };

  // Curves: values at the pointer, or under the arrow keys.
  document.querySelectorAll(".plot").forEach((plot, number) => {
    const data = values[number], svg = plot.querySelector("svg");
    const pointer = svg.querySelector(".pointer"), tip = plot.querySelector(".tip");
    let across = 0;

    const show = (to) => {
      pointer.replaceChildren();
      tip.replaceChildren();
      const places = data.lines.map((line) => nearest(line, to));
      const close = data.lines.map((line, k) => Math.abs(line.at[places[k]][0] - to));
      const first = close.indexOf(Math.min(...close));
      across = data.lines[first].at[places[first]][0];
      draw(pointer, "line", {x1: across, x2: across, y1: data.top, y2: data.bottom});
      const head = document.createElement("div");
      head.textContent = `update ${Math.round(data.lines[first].x[places[first]]).toLocaleString("en")}`;
      tip.append(head);
      data.lines.forEach((line, k) => {
        const place = nearest(line, across), [x, y] = line.at[place];
        if (k !== first && Math.abs(x - across) > 6) return;
        draw(pointer, "circle", {cx: x, cy: y, r: 4, class: line.class});
        const row = document.createElement("div");
        row.textContent = `${line.name} ${plain(line.y[place])}`;
        tip.append(row);
      });
      tip.hidden = false;
      const box = svg.getBoundingClientRect(), outer = plot.getBoundingClientRect();
      const left = box.left - outer.left + across / svg.viewBox.baseVal.width * box.width;
      const right = left + tip.offsetWidth + 14 > outer.width;
      tip.style.left = `${Math.max(4, right ? left - tip.offsetWidth - 10 : left + 10)}px`;
      tip.style.top = `${box.top - outer.top + 6}px`;
    };
    const hide = () => { pointer.replaceChildren(); tip.hidden = true; };

    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      show((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!step) return;
      event.preventDefault();
      const all = [...new Set(data.lines.flatMap((line) => line.at.map((at) => at[0])))].sort((a, b) => a - b);
      const here = tip.hidden ? (step > 0 ? -1 : all.length) : all.indexOf(across);
      show(all[Math.min(all.length - 1, Math.max(0, here + step))]);
    });
  });

  // Image grids of one training: one at a time, by a slider.
  document.querySelectorAll(".stepper").forEach((stepper) => {
    const grids = [...stepper.querySelectorAll("figure")], slider = stepper.querySelector("input");
    if (!slider) return;
    const turn = () => {
      grids.forEach((grid, number) => grid.classList.toggle("now", number === Number(slider.value)));
      slider.setAttribute("aria-valuetext", grids[Number(slider.value)].querySelector("figcaption").textContent);
    };
    stepper.classList.add("live");
    slider.addEventListener("input", turn);
    turn();
  });

  // A link to an artifact opens it.
  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", open);
  open();
})();
