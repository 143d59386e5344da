// The memory in use over time, and the budget, as lines.

const SAMPLES = 120; // older ones leave at the left
const WIDTH = 240;
const HEIGHT = 48;

export class MemoryPlot {
  constructor(figure) {
    this.figure = figure;
    this.used = [];
  }

  add({ used, budget }) {
    this.used = [...this.used, used].slice(-SAMPLES);
    this.figure.hidden = false;
    const top = 1.1 * Math.max(budget ?? 0, ...this.used);
    const height = (bytes) => (HEIGHT * (1 - bytes / top)).toFixed(1);
    const across = WIDTH / (Math.max(this.used.length, SAMPLES / 4) - 1);
    const points = this.used.map((bytes, place) => `${(place * across).toFixed(1)},${height(bytes)}`);
    const last = (this.used.length - 1) * across;
    this.figure.querySelector(".line").setAttribute("points", points.join(" "));
    this.figure.querySelector(".under").setAttribute("points", `0,${HEIGHT} ${points.join(" ")} ${last},${HEIGHT}`);
    const line = this.figure.querySelector(".budget");
    line.toggleAttribute("hidden", budget == null);
    if (budget != null) for (const end of ["y1", "y2"]) line.setAttribute(end, height(budget));
  }
}
