// Repairs for ipywidgets on a static page. Loaded before the theme's icons and before MathJax.

// The theme's FontAwesome replaces <i> by <svg>, which breaks the Play widget; nested, the <i> stays.
window.FontAwesomeConfig = { autoReplaceSvg: "nest" };

// Widgets set maths through MathJax 2's queue, which MathJax 3 does not have: answer in its place.
{
  let current = window.MathJax;
  const Queue = ([, , element]) => {
    const started = current && current.startup && current.startup.promise;
    if (started) started.then(() => current.typesetPromise([element]));
  };
  Object.defineProperty(window, "MathJax", {
    configurable: true,
    get: () => current,
    set: (value) => {
      if (value && !value.Hub) Object.defineProperty(value, "Hub", { value: { Queue } });
      current = value;
    },
  });
}

(() => {
  "use strict";

  // The control that an element belongs to; not every control has the class jupyter-widgets.
  const controlOf = (element) => element.closest(".widget-inline-hbox, .widget-inline-vbox, .jupyter-widgets");

  // The description that stands beside a control, or its tooltip.
  const nameOf = (widget) => {
    const label = widget.querySelector(".widget-label");
    return (label && label.textContent.trim()) || widget.title || "";
  };

  // Slider handles, readouts and Play buttons come without an accessible name: give them the control's description.
  const nameControls = (root) => {
    for (const handle of root.querySelectorAll(".widget-slider [role=slider]:not([aria-label])")) {
      const widget = controlOf(handle);
      const name = nameOf(widget);
      if (!name) continue;
      const several = widget.querySelectorAll("[role=slider]").length > 1;
      const lower = several && handle.classList.contains("noUi-handle-lower");
      handle.setAttribute("aria-label", several ? `${name}, ${lower ? "from" : "to"}` : name);
    }
    for (const readout of root.querySelectorAll(".jupyter-widgets .widget-readout:not([aria-label])")) {
      const name = nameOf(controlOf(readout));
      if (name) readout.setAttribute("aria-label", `value of ${name}`);
    }
    for (const play of root.querySelectorAll(".widget-play:not([aria-label])")) {
      play.setAttribute("aria-label", nameOf(play) || "animation");
      play.setAttribute("role", "group");
      const names = ["play or pause", "stop", "repeat"]; // the order in which ipywidgets draws them
      play.querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-label", names[i] || "control"));
    }
    for (const select of root.querySelectorAll(".jupyter-widgets select:not([aria-label])")) {
      const name = nameOf(controlOf(select));
      if (name) select.setAttribute("aria-label", name);
    }
  };

  // A selection slider speaks its index; say the text that the reader sees instead.
  const speakText = (root) => {
    for (const widget of root.querySelectorAll(".widget-hslider, .widget-vslider")) {
      const handle = widget.querySelector("[role=slider]");
      const readout = widget.querySelector(".widget-readout");
      const text = readout && readout.textContent.trim();
      if (handle && text && handle.getAttribute("aria-valuetext") !== text) {
        handle.setAttribute("aria-valuetext", text);
      }
    }
  };

  const start = () => {
    if (!document.querySelector('script[type="application/vnd.jupyter.widget-view+json"]')) return;
    let waiting = false;
    const look = () => {
      waiting = false;
      nameControls(document);
      speakText(document);
    };
    new MutationObserver(() => {
      if (!waiting) {
        waiting = true;
        requestAnimationFrame(look);
      }
    }).observe(document.body, { childList: true, subtree: true, characterData: true });
    look();
  };

  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", start);
  } else {
    start();
  }
})();
