"use strict";
const { report, map } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const { layers, plan, sinks, tokens } = report;
const ROLES = { dense: "dense", delta: "Δ-layer", sparse: "sparse" };
const percent = (x, digits = 1) => (100 * x).toFixed(digits) + " %";
const roleOf = (place) => ROLES[plan.roles[place]];
const escapeHtml = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
// As a person tells blanks and line ends apart; long tokens are cut.
const shown = (text) => escapeHtml(JSON.stringify(text).slice(1, -1).replace(/ /g, "␣").slice(0, 24)) || "∅";

/* ---- screens: light and dark ---- */
const system = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => ($("theme").value || (system.matches ? "dark" : "light")) === "dark";
function look() {
  const dark = isDark();
  return {
    ink: dark ? "#e6e9ef" : "#1c2330", soft: dark ? "#9aa4b5" : "#5b6577", grid: dark ? "#2e3542" : "#e6e9ef",
    dense: dark ? "#9aa4b5" : "#7b8494", delta: dark ? "#ffb454" : "#d9730d", sparse: dark ? "#7aa5ff" : "#3a6fd8",
    third: dark ? "#6fd1a8" : "#2a9d6f", card: dark ? "#1b2029" : "#ffffff", empty: dark ? "#232936" : "#eef0f4",
    // From the background up, so that what is little is quiet on both screens.
    scale: dark ? [[0, "#1b2029"], [0.25, "#27406f"], [0.55, "#2f7fb8"], [0.8, "#5fd0b5"], [1, "#f4f7b0"]]
      : [[0, "#ffffff"], [0.25, "#cfe3f5"], [0.55, "#6aaed6"], [0.8, "#2171b5"], [1, "#08264f"]],
  };
}
function layout(extra) {
  const c = look();
  const axis = { gridcolor: c.grid, zerolinecolor: c.grid, linecolor: c.grid, tickfont: { color: c.soft },
    title: { font: { color: c.soft, size: 12 } }, automargin: true };
  const merge = (own) => ({ ...axis, ...own, title: { ...axis.title, ...(own?.title ?? {}) } });
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: c.ink, size: 12 },
    margin: { l: 56, r: 16, t: 12, b: 44 }, hoverlabel: { font: { size: 12 } },
    legend: { orientation: "h", y: 1.12, x: 0 }, ...extra, xaxis: merge(extra.xaxis), yaxis: merge(extra.yaxis) };
}
const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
const draw = (id, traces, extra) => Plotly.react($(id), traces, layout(extra), options);
const layerAxis = (title) => ({ title: { text: title }, type: "category" });
const colorOf = (place) => look()[plan.roles[place]];

/* ---- head of the page ---- */
function header() {
  $("title").textContent = `What the attention of ${report.model.name} does`;
  $("about").textContent = `${report.model.class}, ${layers.length} full-attention layers; ${report.text}. ` +
    `${tokens.prompt} tokens, then ${tokens.new} as full attention decodes them, ` +
    `${tokens.observed_steps} decode steps looked at.`;
  const recall = report.recall.map((each) => each.recall);
  const mean = recall.reduce((a, b) => a + b, 0) / recall.length;
  const deltas = plan.delta_layers.join(", ") || "none";
  const cards = [
    [deltas, "Δ-layers of the plan"],
    [`${plan.budget_pages} × ${plan.page_size}`, "pages × tokens a sparse layer reads"],
    [recall.length ? percent(mean) : "–", "mean recall of the plan's pages"],
    [percent(sinks.rate), `of ${sinks.heads} heads have a sink (ε = ${sinks.epsilon})`],
    [percent(sinks.first_token_rate), "of heads have one in the first token"],
  ];
  $("cards").innerHTML = cards.map(([big, small]) =>
    `<div class="card"><b>${escapeHtml(big)}</b><span>${escapeHtml(small)}</span></div>`).join("");
  $("footer").textContent = `${report.command} · ${report.date} · ` +
    `commit ${report.commit ?? "unknown"} · ${report.machine.cpu} · ` +
    Object.entries(report.versions).filter(([, v]) => v).map(([k, v]) => `${k} ${v}`).join(", ");
}

/* ---- layers ---- */
function drawShift() {
  const c = look();
  const shapes = layers.map((_, place) => place).filter((place) => plan.roles[place] === "delta").map((place) => ({
    type: "line", x0: place, x1: place, y0: 0, y1: 1, yref: "paper", line: { color: c.delta, width: 1.5, dash: "dot" } }));
  const points = layers.slice(1).map((layer, i) => ({ layer, place: i + 1, shift: report.shift[i + 1] }));
  const line = { x: points.map((p) => String(p.layer)), y: points.map((p) => p.shift), mode: "lines",
    line: { color: c.soft, width: 1.5 }, hoverinfo: "skip", showlegend: false };
  const traces = Object.keys(ROLES).map((role) => {
    const own = points.filter((p) => plan.roles[p.place] === role);
    return { x: own.map((p) => String(p.layer)), y: own.map((p) => p.shift), mode: "markers", name: ROLES[role],
      marker: { color: c[role], size: role === "delta" ? 13 : 8, symbol: role === "delta" ? "diamond" : "circle" },
      text: own.map((p) => plan.sources[p.place] === null ? "" : `<br>reads the pages of Δ-layer ${plan.sources[p.place]}`),
      hovertemplate: `layer %{x}: shift %{y:.3f}<br>${ROLES[role]}%{text}<extra></extra>` };
  }).filter((trace) => trace.x.length);
  const first = { x: [String(layers[0])], y: [null], showlegend: false, hoverinfo: "skip", mode: "markers" };
  draw("shift", [first, line, ...traces], { shapes, xaxis: layerAxis("layer"),
    yaxis: { title: { text: "shift, 1 − cos" }, rangemode: "normal" } });
}
function drawRecall() {
  const c = look(), rows = report.recall, x = rows.map((r) => String(r.layer));
  draw("recall", [
    { type: "bar", x, y: rows.map((r) => r.best), name: "its own pages", marker: { color: c.empty, line: { color: c.soft, width: 1 } },
      hovertemplate: "layer %{x}: its own pages hold %{y:.1%}<extra></extra>" },
    { type: "bar", x, y: rows.map((r) => r.captured), name: "the plan's pages", marker: { color: c.sparse },
      text: rows.map((r) => `Δ-layer ${r.source}; recall ${percent(r.recall)}`), textposition: "none",
      hovertemplate: "layer %{x}: the plan's pages hold %{y:.1%}<br>selected by %{text}<extra></extra>" },
  ], { barmode: "overlay", bargap: 0.25, xaxis: layerAxis("sparse layer"),
    yaxis: { title: { text: "share of its attention" }, tickformat: ".0%", range: [0, 1.02] } });
}

/* ---- pages ---- */
function drawMatrix(id, z, name, text) {
  const c = look(), names = layers.map(String);
  draw(id, [{ type: "heatmap", z, x: names, y: names, zmin: 0, zmax: 1, colorscale: c.scale, xgap: 0.5, ygap: 0.5,
    colorbar: { thickness: 10, outlinewidth: 0, tickformat: ".0%", title: { text: "" } },
    hovertemplate: `${text}: <b>%{z:.1%}</b><extra></extra>` }],
  { xaxis: layerAxis("layer that reads"), yaxis: { ...layerAxis("layer that selects"), autorange: "reversed" },
    shapes: plan.sources.flatMap((source, place) => source === null ? [] : [{ type: "rect", x0: place - 0.5, x1: place + 0.5,
      y0: layers.indexOf(source) - 0.5, y1: layers.indexOf(source) + 0.5, line: { color: c.delta, width: 1.5 } }]) });
}
function drawDrift() {
  const c = look(), only = $("drift-layers").value, show = $("drift-show").value, { lags, chance } = report.drift;
  const colors = [c.delta, c.sparse, c.third, "#b07cd8", "#d86a8a", "#8a9a3f"];
  const places = layers.map((_, i) => i).filter((i) => only === "all" || plan.roles[i] === "delta");
  const traces = places.map((place, i) => ({ x: lags, y: report.drift[show][layers[place]],
    mode: "lines", name: `layer ${layers[place]}`, line: { color: only === "all" ? colorOf(place) : colors[i % colors.length],
      width: plan.roles[place] === "delta" ? 2.5 : 1 }, opacity: plan.roles[place] === "delta" ? 1 : 0.55,
    hovertemplate: `layer ${layers[place]} (${roleOf(place)})<br>after %{x} steps: <b>%{y:.1%}</b> ${show === "held" ? "held" : "in common"}<extra></extra>` }));
  if (show === "overlap" && chance !== null) {
    traces.push({ x: [lags[0], lags[lags.length - 1]], y: [chance, chance], mode: "lines", name: "by chance",
      line: { color: c.soft, width: 1.5, dash: "dot" }, hovertemplate: `two random choices: ${percent(chance)}<extra></extra>` });
  }
  draw("drift", traces, { showlegend: only !== "all" || places.length <= 12, xaxis: { title: { text: "age of the choice, decode steps" } },
    yaxis: { title: { text: show === "held" ? "share of the layer's attention" : "pages in common" }, tickformat: ".0%", range: [0, 1.02] } });
}

/* ---- page map ---- */
const [STEPS, DEPTH, PAGES] = map.shape;
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const levels = bytes(map.levels), bits = bytes(map.selected);
const at = (step, place, page) => (step * DEPTH + place) * PAGES + page;
const isSelected = (i) => (bits[i >> 3] >> (7 - (i & 7))) & 1;
function isRead(step, place, page, show) {
  if (show === "mass") return true;
  if (show === "selected") return isSelected(at(step, place, page)) === 1;
  const source = plan.sources[place];
  return source === null || isSelected(at(step, layers.indexOf(source), page)) === 1;
}
function mapRow(step, place, show) {
  const used = Math.ceil(map.lengths[step] / plan.page_size / map.pooled);
  return Array.from({ length: PAGES }, (_, page) => page < used && isRead(step, place, page, show)
    ? map.floor * (1 - levels[at(step, place, page)] / 250) : null);
}
function drawMap() {
  const c = look(), byLayer = $("map-axis").value === "layer", show = $("map-show").value;
  const slider = $("map-slider");
  slider.max = (byLayer ? DEPTH : STEPS) - 1;
  const now = Math.min(Number(slider.value), Number(slider.max));
  const rows = byLayer ? map.steps.map((_, step) => mapRow(step, now, show))
    : layers.map((_, place) => mapRow(now, place, show));
  const y = byLayer ? map.steps : layers.map(String);
  $("map-label").textContent = byLayer ? `layer ${layers[now]} (${roleOf(now)})` : `decode step ${map.steps[now]}`;
  const size = plan.page_size * map.pooled;
  const prompt = tokens.prompt / plan.page_size - 0.5;
  draw("map", [{ type: "heatmap", z: rows, y, x: Array.from({ length: PAGES }, (_, i) => i * map.pooled), zmin: map.floor, zmax: 0,
    colorscale: c.scale, hoverongaps: false, customdata: rows.map((row) => row.map((z, i) =>
      [z === null ? 0 : Math.pow(10, z), i * size, (i + 1) * size - 1])),
    colorbar: { thickness: 10, outlinewidth: 0, tickvals: [-5, -4, -3, -2, -1, 0],
      ticktext: ["≤ 0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"], title: { text: "" } },
    hovertemplate: (byLayer ? "step %{y}" : "layer %{y}") +
      ", page %{x} (tokens %{customdata[1]}–%{customdata[2]})<br>attention <b>%{customdata[0]:.3%}</b><extra></extra>" }],
  { plot_bgcolor: c.empty, xaxis: { title: { text: map.pooled > 1 ? `page, ${map.pooled} put together` : "page" }, showgrid: false },
    yaxis: { title: { text: byLayer ? "decode step" : "layer" }, autorange: "reversed", showgrid: false,
      type: byLayer ? "linear" : "category" },
    shapes: [{ type: "line", x0: prompt, x1: prompt, y0: 0, y1: 1, yref: "paper", line: { color: c.delta, width: 1.5, dash: "dot" } }],
    annotations: [{ x: prompt, y: 1, yref: "paper", yanchor: "bottom", xanchor: "right", showarrow: false, text: "end of the prompt",
      font: { color: c.delta, size: 11 } }], margin: { l: 56, r: 16, t: 22, b: 44 } });
}
let playing = null;
function play() {
  const stop = () => { clearInterval(playing); playing = null; $("map-play").textContent = "play"; };
  if (playing !== null) return stop();
  $("map-play").textContent = "stop";
  playing = setInterval(() => {
    const slider = $("map-slider");
    if (Number(slider.value) >= Number(slider.max)) return stop();
    slider.value = Number(slider.value) + 1;
    drawMap();
  }, 250);
}

/* ---- heads and sinks ---- */
function drawHeads(id, z, hover, extra = {}) {
  const c = look();
  const heads = z[0].map((_, head) => String(head));
  draw(id, [{ type: "heatmap", z: z[0].map((_, head) => z.map((row) => row[head])), x: layers.map(String), y: heads,
    colorscale: c.scale, xgap: 0.5, ygap: 0.5, colorbar: { thickness: 10, outlinewidth: 0, title: { text: "" } },
    hovertemplate: `layer %{x}, head %{y}<br>${hover}<extra></extra>`, ...extra }],
  { xaxis: layerAxis("layer"), yaxis: layerAxis("head") });
}
function drawSinks() {
  const c = look(), per = sinks.layers, turn = (key) => per[0][key].map((_, head) => per.map((each) => each[key][head]));
  const tops = turn("top_token");
  drawHeads("heads", per.map((each) => each.top_mean), "%{customdata}<br>mean attention <b>%{z:.1%}</b>", { zmin: 0, zmax: 1,
    customdata: tops.map((row) => row.map((token) => `token ${token}: ${shown(report.token_texts[token] ?? "")}`)),
    colorbar: { thickness: 10, outlinewidth: 0, tickformat: ".0%", title: { text: "" } } });
  for (const [key, hover] of [["learned", "the learned sink takes <b>%{z:.1%}</b>"], ["gate", "gate <b>%{z:.3f}</b>"]]) {
    if (!per.every((each) => key in each)) continue;
    $(`${key}-box`).hidden = false;
    drawHeads(key, per.map((each) => each[key]), hover, { zmin: 0, zmax: 1 });
  }
  const found = sinks.sinks.length > 0;
  let bars = sinks.sinks.slice(0, 15).map((s) => ({ name: `${s.position}: ${shown(s.token)}`, size: s.heads / sinks.heads,
    text: `sink of ${s.heads} heads, at most ${percent(s.mean)} (layer ${s.layer}, head ${s.head})<br>` +
      `value norm ${s.value_ratio.toFixed(2)} × the median, hidden state ${s.hidden_ratio.toFixed(1)} ×` }));
  if (!found) {
    const best = new Map();
    per.forEach((each) => each.top_token.forEach((token, head) => {
      if (each.top_mean[head] > (best.get(token)?.size ?? 0)) {
        best.set(token, { name: `${token}: ${shown(report.token_texts[token] ?? "")}`, size: each.top_mean[head],
          text: `mean attention ${percent(each.top_mean[head])} in layer ${each.layer}, head ${head}` });
      }
    }));
    bars = [...best.values()].sort((a, b) => b.size - a.size).slice(0, 15);
  }
  const few = `Tokens with fewer than ${sinks.least_queries} queries behind them are left out.`;
  $("tokens-about").textContent = (found ? "By the share of all heads that have it as a sink. " :
    `No token is a sink. These come closest to ε = ${sinks.epsilon}: their largest mean attention in any head. `) + few;
  bars.reverse();
  draw("tokens", [{ type: "bar", orientation: "h", y: bars.map((b) => b.name), x: bars.map((b) => b.size), text: bars.map((b) => b.text),
    textposition: "none", marker: { color: found ? c.sparse : c.dense }, hovertemplate: "%{y}<br>%{text}<extra></extra>" }],
  { xaxis: { title: { text: found ? "share of all heads" : "mean attention" }, tickformat: ".0%", rangemode: "tozero" },
    yaxis: { type: "category", tickfont: { family: "ui-monospace, DejaVu Sans Mono, monospace", size: 11, color: c.soft } },
    shapes: found ? [] : [{ type: "line", x0: sinks.epsilon, x1: sinks.epsilon, y0: 0, y1: 1, yref: "paper",
      line: { color: c.delta, width: 1.5, dash: "dot" } }] });
  const hidden = sinks.hidden, x = hidden.map((h) => String(h.layer));
  const series = [
    ["norm_ratio", "norm of the largest token", c.sparse, hidden.map((h) => `token ${h.norm_token}: ${shown(h.norm_text)}`)],
    ["first_norm_ratio", "norm of the first token", c.third, hidden.map(() => "token 0")],
    ["peak_ratio", "largest entry", c.delta, hidden.map((h) => `token ${h.peak_token}, channel ${h.peak_channel}`)],
  ];
  draw("hidden", series.map(([key, name, color, text]) => ({ x, y: hidden.map((h) => h[key]), mode: "lines+markers", name, text,
    line: { color, width: 2 }, marker: { size: 5 }, hovertemplate: `layer %{x}, %{text}<br>${name}: <b>%{y:.2f} ×</b><extra></extra>` })),
  { xaxis: layerAxis("layer"), yaxis: { type: "log", dtick: 1, title: { text: "÷ median" } } });
}
function drawFirst() {
  const c = look(), rows = report.first_page, deltas = rows.filter((r) => plan.delta_layers.includes(r.layer));
  const lost = (r) => r.missed_mass == null ? "" :
    `<br>in ${percent(r.source_missed)} of the steps its Δ-layer's scores miss it;<br>its mean share is then ${percent(r.missed_mass)}`;
  draw("first", [
    { type: "bar", x: rows.map((r) => String(r.layer)), y: rows.map((r) => r.mass), name: "share of attention", text: rows.map(lost),
      textposition: "none", marker: { color: rows.map((_, place) => colorOf(place)) },
      hovertemplate: "layer %{x}: <b>%{y:.1%}</b> on the first page%{text}<extra></extra>" },
    { x: deltas.map((r) => String(r.layer)), y: deltas.map((r) => r.missed), name: "missed by a Δ-layer", mode: "markers",
      marker: { color: c.ink, size: 11, symbol: "diamond-open", line: { width: 2 } },
      hovertemplate: "Δ-layer %{x} misses it in <b>%{y:.1%}</b> of the steps<extra></extra>" },
  ], { xaxis: layerAxis("layer"), yaxis: { tickformat: ".0%", range: [0, 1.02] } });
}
function drawRemoval() {
  const c = look(), { removal, sink_pages: forced, pages: count, steps } = report.losses;
  const rows = [...forced, ...removal.slice(1)].reverse();
  $("removal-about").textContent = rows.length ? `KL of full attention's next token to the treatment's, over ${steps} decode steps. ` +
    `S is the number of first pages forced in; at S = 0 they are left to selection. Masked out: the first ` +
    `${count === 1 ? "page" : `${count} pages`}. Budget and Δ-layers are the plan's.` : report.losses.refused ?? "Was not asked for.";
  draw("removal", [{ type: "bar", orientation: "h", y: rows.map((r) => r.name.replace(", ", ",<br>")), x: rows.map((r) => r.kl),
    marker: { color: rows.map((r) => r.name.startsWith("DELTA") ? c.sparse : c.dense) }, textposition: "auto",
    text: rows.map((r) => r.kl.toFixed(4)), customdata: rows.map((r) => [r.perplexity, r.agreement]), constraintext: "none",
    hovertemplate: "%{y}<br>KL <b>%{x:.5f}</b><br>perplexity %{customdata[0]:.4f}<br>" +
      "%{customdata[1]:.1%} of the likeliest tokens are full attention's<extra></extra>" }],
  { xaxis: { title: { text: "KL, nats a token" }, rangemode: "tozero" }, yaxis: { type: "category" } });
}
function drawFactors() {
  const c = look(), { factors, removal, sink_pages: forced } = report.losses, base = removal[0]?.loss;
  const colors = { all: c.sparse, "with a sink": c.delta, without: c.third };
  const plain = forced.find((r) => r.sink_pages === report.losses.pages) ?? forced[0];
  const kinds = [...new Set(factors.map((r) => `${r.under}, ${r.heads}`))];
  draw("factors", kinds.map((kind) => {
    const own = factors.filter((r) => `${r.under}, ${r.heads}` === kind);
    const { under, heads } = own[0], one = under === "DELTA" ? plain.loss : base;
    const points = [...own.map((r) => [r.factor, r.loss - base, r.error]), [1, one - base, plain.error * (under === "DELTA")]].sort((a, b) => a[0] - b[0]);
    const name = `${under}, ${heads === "all" ? "all heads" : `heads ${heads === "without" ? "without a sink" : heads}`}`;
    return { x: points.map((p) => p[0]), y: points.map((p) => p[1]), name, mode: "lines+markers",
      customdata: points.map((p) => p[2]), line: { color: colors[heads], width: 2, dash: under === "DELTA" ? "dot" : "solid" },
      hovertemplate: `${name}<br>× %{x}: <b>%{y:+.4f}</b> ± %{customdata:.4f} nats a token<extra></extra>` };
  }), { xaxis: { type: "log", title: { text: "factor" }, tickvals: [0.5, 0.8, 1, 1.25, 2] },
    yaxis: { title: { text: "loss, nats a token" } } });
}
function sinkTexts() {
  $("sinks-title").textContent = sinks.sinks.length
    ? `Attention sinks: ${percent(sinks.rate)} of the heads have one` : "Attention sinks: there are none";
  $("sinks-about").textContent = `A token is a sink of a head if the head's attention to it, averaged over the queries that see it, ` +
    `is above ε = ${sinks.epsilon} (Gu et al., arXiv 2410.10781), over all ${sinks.tokens} tokens of the text in one pass.`;
  if (!sinks.sinks.length) return;
  const rows = sinks.sinks.slice(0, 20).map((s) => `<tr><td>${s.position}</td><td>${shown(s.token)}</td><td>${s.page}</td>` +
    `<td>${s.heads}</td><td>${percent(s.mean)}</td><td>${s.value_ratio.toFixed(2)} ×</td><td>${s.hidden_ratio.toFixed(1)} ×</td></tr>`);
  $("sink-table").innerHTML = "<table><thead><tr><th>position</th><th>token</th><th>page</th><th>heads</th><th>most</th>" +
    `<th>value norm</th><th>hidden norm</th></tr></thead><tbody>${rows.join("")}</tbody></table>`;
}

function drawAll() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  drawShift();
  drawRecall();
  drawMatrix("captured", report.captured, "captured", "pages of layer %{y} hold of layer %{x}'s attention");
  drawMatrix("overlap", report.overlap, "overlap", "layers %{y} and %{x} have in common");
  drawDrift();
  drawMap();
  drawHeads("entropy", report.entropy_bits, "<b>%{z:.2f} bits</b>, as %{customdata} equal tokens", { zmin: 0,
    customdata: report.entropy_bits[0].map((_, head) => report.entropy_bits.map((row) => Math.pow(2, row[head]).toFixed(1))) });
  drawSinks();
  drawFirst();
  drawRemoval();
  drawFactors();
}

header();
sinkTexts();
drawAll();
$("theme").addEventListener("change", drawAll);
system.addEventListener("change", drawAll);
$("drift-layers").addEventListener("change", drawDrift);
$("drift-show").addEventListener("change", drawDrift);
$("map-slider").addEventListener("input", drawMap);
$("map-show").addEventListener("change", drawMap);
$("map-axis").addEventListener("change", () => { $("map-slider").value = 0; drawMap(); });
$("map-play").addEventListener("click", play);
document.body.dataset.ready = "yes";
