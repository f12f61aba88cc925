// Charts come as Vega-Lite; here they get the colours of the theme and follow the slider.

const views = []; // that follow the slider
const still = [];

function theme() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  const text = { labelColor: value("--quiet"), titleColor: value("--text"), labelFontSize: 12, titleFontSize: 13 };
  return {
    background: null,
    font: value("--font"),
    padding: 4,
    view: { stroke: null },
    range: { category: [value("--same"), value("--different")] },
    axis: {
      ...text, titleFontWeight: "normal", gridColor: value("--line"), domainColor: value("--quiet"),
      tickColor: value("--quiet"), labelOverlap: true, tickCount: 6,
    },
    axisX: { grid: false },
    legend: { ...text, orient: "top", symbolType: "square", labelFontSize: 13 },
    line: { color: value("--same"), strokeWidth: 2 },
    point: { color: value("--different") },
    rule: { color: value("--text") },
  };
}

async function drawCharts(specs, now) {
  const config = theme();
  for (const view of [...views.splice(0), ...still.splice(0)]) view.finalize();
  for (const [name, spec] of Object.entries(specs)) {
    const place = document.getElementById(`chart-${name}`);
    // ast: expressions are interpreted, for the policy of this page lets nothing be compiled.
    const options = {
      ast: true, actions: false, renderer: "svg", config, defaultStyle: false, loader: { load: () => Promise.reject() },
      tooltip: { disableDefaultStyle: true },
    };
    const drawn = (await vegaEmbed(place, { ...spec, datasets: { ...spec.datasets, now: [now] } }, options)).view;
    if (follows(spec)) views.push(drawn);
    else still.push(drawn);
  }
}

function follows(spec) {
  return spec.layer?.some((layer) => layer.data?.name === "now") ?? false;
}

function moveCharts(now) {
  for (const view of views) view.data("now", [now]).run();
}
