// One pair as a card, and the chart of its parts.

const data = { ...(await unzipped()), pictures: JSON.parse(document.getElementById("pictures").textContent) };
const draw = () => drawCharts(data.charts, {});

document.getElementById("pairs").append(card(data, 0, data.called));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
await draw();
document.documentElement.dataset.charts = "ready";
