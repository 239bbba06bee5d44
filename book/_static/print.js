/* Paper is white: a page is printed as it is in light mode, whatever it is on the screen. */

{
  const page = document.documentElement;
  let screen = null;
  const light = () => {
    screen ??= page.dataset.theme;
    page.dataset.theme = "light";
  };
  const back = () => {
    page.dataset.theme = screen ?? page.dataset.theme;
    screen = null;
  };
  // Not every browser that prints tells both.
  addEventListener("beforeprint", light);
  addEventListener("afterprint", back);
  matchMedia("print").addEventListener("change", (print) => (print.matches ? light() : back()));
}
