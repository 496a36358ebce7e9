(() => {
  "use strict";
  const config = {
    displaylogo: false,
    responsive: true,
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtons: [["toImage", "resetScale2d"]],
  };
  const shapes = {
    circle: '<circle cx="8" cy="8" r="4.5"/>',
    square: '<path d="M3.5 3.5h9v9h-9z"/>',
    diamond: '<path d="M8 2l6 6-6 6-6-6z"/>',
    "triangle-up": '<path d="M8 3l5.5 9.5h-11z"/>',
    "triangle-down": '<path d="M8 13L2.500 3.500h11z"/>',
    cross: '<path d="M6.200 2.500h3.600v3.700h3.700v3.600H9.800v3.700H6.200V9.800H2.500V6.200h3.700z"/>',
    x: '<path d="M4.700 2.500L8 5.800l3.300-3.300 2.200 2.200L10.200 8l3.300 3.300-2.200 2.200L8 10.200l-3.300 3.300-2.200-2.200L5.800 8 2.500 4.700z"/>',
    star: '<path d="M8 1.500l1.600 4.600h4.900l-3.900 3 1.400 4.700-4-2.800-4 2.800 1.400-4.700-3.900-3h4.900z"/>',
  };
  const dashes = { dash: "6 4", dot: "2 3", dashdot: "6 3 2 3" };
  for (const swatch of document.querySelectorAll(".swatch")) {
    const [name, kind] = swatch.dataset.symbol.split(/-(?=(?:open|dash|dot|dashdot|solid)$)/);
    const paint = kind === "open" ? 'fill="none" stroke="currentColor" stroke-width="1.500"' : 'fill="currentColor"';
    const line = `fill="none" stroke="currentColor" stroke-width="2" stroke-dasharray="${dashes[kind] || "none"}"`;
    const drawn = name === "line" ? `<path d="M0 8h28" ${line}/>` : shapes[name] || shapes.circle;
    swatch.innerHTML = `<svg width="${name === "line" ? 28 : 16}" height="16" ${paint} aria-hidden="true">${drawn}</svg>`;
  }

  // Paper is white, whatever theme the reader has; print styles are not in force yet when the browser says beforeprint.
  const paper = { "--ink": "#000000", "--faint": "#444444", "--rule": "#cccccc", "--box": "#ffffff" };
  const wide = 680; // pixels: the text of a sheet of A4 or Letter between margins of 14 mm
  let printing = false;
  const variable = (name) =>
    printing ? paper[name] : getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = (layout) => {
    const ink = variable("--ink"), rule = variable("--rule"), box = variable("--box");
    const axis = { gridcolor: rule, linecolor: rule, zerolinecolor: rule };
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 13, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { ...layout.hoverlabel, bgcolor: box, bordercolor: rule, font: { color: ink } },
      // Where there is a finger and no mouse, a drag scrolls the page.
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--faint"), activecolor: ink },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
    };
  };

  const plots = [];
  for (const source of document.querySelectorAll("script[data-figure]")) {
    const place = document.getElementById(source.dataset.figure);
    const { data, layout } = JSON.parse(source.textContent);
    for (const trace of data) {
      // One text a row or column in the page, one a cell for plotly, which shares the string.
      if (trace.type === "heatmap") {
        trace.customdata = trace.customdata.map(([text]) => trace.x.map(() => text));
        if (trace.text) trace.text = trace.y.map(() => trace.text[0]);
      }
    }
    Plotly.newPlot(place, data, themed(layout), config);
    plots.push(place);
  }

  const follow = () => plots.forEach((place) => Plotly.react(place, place.data, themed(place.layout), config));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", follow);

  // For print: every figure at the width of a sheet, dark on white, and every fold open.
  let opened = [];
  const toPaper = () => {
    if (printing) return;
    printing = true;
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((fold) => { fold.open = true; });
    for (const place of plots) {
      const box = place.closest(".panel") ? (wide - 16) / 2 : place.closest(".square") ? 560 : wide;
      // A heat map of many columns keeps their width, and is made smaller as a whole.
      const width = Math.max(box, parseInt(place.parentElement.style.minWidth, 10) || 0);
      place.style.width = `${width}px`;
      place.style.zoom = box / width;
      Plotly.react(place, place.data, { ...themed(place.layout), width, autosize: false }, { ...config, responsive: false });
    }
  };
  const toScreen = () => {
    if (!printing) return;
    printing = false;
    opened.forEach((fold) => { fold.open = false; });
    for (const place of plots) {
      place.style.width = place.style.zoom = "";
      const { width, ...layout } = place.layout;
      Plotly.react(place, place.data, { ...themed(layout), autosize: true }, config);
    }
  };
  addEventListener("beforeprint", toPaper);
  addEventListener("afterprint", toScreen);
  matchMedia("print").addEventListener("change", (media) => (media.matches ? toPaper() : toScreen()));

  for (const box of document.querySelectorAll("input[data-series]")) {
    box.addEventListener("change", () => {
      for (const place of plots.filter((plot) => plot.id.startsWith("round-"))) {
        const indices = place.data.flatMap((trace, at) => (String(trace.meta.series) === box.dataset.series ? [at] : []));
        if (indices.length) Plotly.restyle(place, { visible: box.checked }, indices);
      }
    });
  }
})();
