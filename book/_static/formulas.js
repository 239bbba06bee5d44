/* A displayed formula that is wider than its place gets smaller before it scrolls, and on paper until it fits. For that
   tokcx.css needs its width, in units of its font. */

{
  const measure = () => {
    for (const formula of document.querySelectorAll('mjx-container[display="true"] > mjx-math')) {
      const width = formula.getBoundingClientRect().width / parseFloat(getComputedStyle(formula).fontSize);
      if (width) formula.style.setProperty("--tokcx-width", width);
    }
  };
  addEventListener("load", () => window.MathJax?.startup?.promise?.then(measure));
}
