// A picture in full: the arrow keys go on to the next one, Escape closes.

const dialog = document.querySelector("#larger");
const image = dialog.querySelector("img");
const link = dialog.querySelector("a");
const opened = () => [...document.querySelectorAll(".open img")];
let shown;

export function openPicture(picture) {
  show(picture);
  dialog.showModal();
}

function show(picture) {
  shown = picture;
  image.src = picture.src;
  image.alt = picture.alt;
  image.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
  dialog.querySelector(".caption").textContent = picture.alt;
  link.href = picture.src;
  link.download = picture.dataset.filename;
  const place = opened().indexOf(picture);
  dialog.querySelector("[data-go='-1']").disabled = place <= 0;
  dialog.querySelector("[data-go='1']").disabled = place === opened().length - 1;
}

function go(by) {
  const next = opened()[opened().indexOf(shown) + by];
  if (next) show(next);
}

dialog.addEventListener("click", (event) => {
  const by = event.target.closest("[data-go]")?.dataset.go;
  if (by) go(Number(by));
  else if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) go(by);
});
dialog.addEventListener("close", () => shown.closest("button")?.focus());
