/* Paper is white: a page is printed as it is in light mode, whatever it is on the screen. And nobody can scroll on it: a
   wide displayed formula gets smaller there until it fits, for which tokcx.css needs its width, in units of its font. */

{
  const page = document.documentElement;
  let screen = null;
  const ready = () => {
    screen ??= page.dataset.theme;
    page.dataset.theme = "light";
    for (const formula of document.querySelectorAll('mjx-container[display="true"] > mjx-math')) {
      const width = formula.getBoundingClientRect().width / parseFloat(getComputedStyle(formula).fontSize);
      formula.style.setProperty("--tokcx-width", width);
    }
  };
  const back = () => {
    page.dataset.theme = screen ?? page.dataset.theme;
    screen = null;
  };
  // Not every browser that prints tells both.
  addEventListener("beforeprint", ready);
  addEventListener("afterprint", back);
  matchMedia("print").addEventListener("change", (print) => (print.matches ? ready() : back()));
}
