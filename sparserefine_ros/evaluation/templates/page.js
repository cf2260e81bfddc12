"use strict";
// Pictures of a frame, one at a time, with the same place and size kept from view to view.
(() => {
  const dialog = document.getElementById("zoom");
  if (!dialog) return;
  const field = document.getElementById("zoom-field");
  const image = document.getElementById("zoom-image");
  const name = document.getElementById("zoom-name");
  let views = [], at = 0, scale = 1, x = 0, y = 0, held = null;

  const place = () => { image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`; };
  const whole = () => { scale = 1; x = y = 0; place(); };
  const show = (index) => {
    at = (index + views.length) % views.length;
    const view = views[at];
    image.src = view.querySelector("img").src;
    image.alt = view.querySelector("img").alt;
    name.textContent = `${view.dataset.frame}: ${view.dataset.name} (${at + 1} of ${views.length})`;
    image.style.imageRendering = scale > 2 ? "pixelated" : "auto";
  };

  for (const button of document.querySelectorAll("button.view")) {
    button.addEventListener("click", () => {
      views = [...button.closest(".views").querySelectorAll("button.view")];
      whole();
      show(views.indexOf(button));
      dialog.showModal();
    });
  }
  document.getElementById("zoom-close").addEventListener("click", () => dialog.close());
  field.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = field.getBoundingClientRect();
    const px = event.clientX - box.left - box.width / 2, py = event.clientY - box.top - box.height / 2;
    const factor = Math.min(24, Math.max(1, scale * Math.exp(-event.deltaY / 400))) / scale;
    x = px - (px - x) * factor;
    y = py - (py - y) * factor;
    scale *= factor;
    if (scale === 1) x = y = 0;
    image.style.imageRendering = scale > 2 ? "pixelated" : "auto";
    place();
  }, { passive: false });
  field.addEventListener("pointerdown", (event) => { held = [event.clientX - x, event.clientY - y]; field.setPointerCapture(event.pointerId); });
  field.addEventListener("pointermove", (event) => {
    if (!held) return;
    x = event.clientX - held[0];
    y = event.clientY - held[1];
    place();
  });
  for (const end of ["pointerup", "pointercancel"]) field.addEventListener(end, () => { held = null; });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(at + 1);
    else if (event.key === "ArrowLeft") show(at - 1);
    else if (event.key === "0") whole();
  });
})();
