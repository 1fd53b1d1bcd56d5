// Markdown to elements, as models write it: headings, paragraphs, lists, quotes, tables, code, emphasis, links.
// Text becomes text nodes and nothing is parsed as HTML, so that an answer cannot bring markup or scripts.

const INLINE = [
  [/`([^`\n]+)`/, (m) => element("code", m[1])],
  [/\*\*(?=\S)([^\n]*?\S)\*\*/, (m) => element("strong", ...inline(m[1]))],
  [/(?<![\w*])[*_](?=[^\s*_])([^\n*_]*?[^\s*_])[*_](?![\w*])/, (m) => element("em", ...inline(m[1]))],
  [/\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/, (m) => link(m[2], ...inline(m[1]))],
  [/https?:\/\/[^\s<>)\]"']*[^\s<>)\]"'.,;:!?]/, (m) => link(m[0], m[0])],
];
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const QUOTE = /^\s{0,3}>\s?/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const DELIMITER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEPTH = 8; // of lists and quotes in each other
let level; // of the last heading

function element(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

function link(href, ...children) {
  return Object.assign(element("a", ...children), { href, target: "_blank", rel: "noopener noreferrer" });
}

/** The nodes of a line's text: the earliest construct, and what stands around it. */
function inline(text) {
  const nodes = [];
  while (text) {
    let first = null, make = null;
    for (const [pattern, maker] of INLINE) {
      const found = pattern.exec(text);
      if (found && (!first || found.index < first.index)) [first, make] = [found, maker];
    }
    if (!first) break;
    if (first.index) nodes.push(text.slice(0, first.index));
    nodes.push(make(first));
    text = text.slice(first.index + first[0].length);
  }
  return text ? [...nodes, text] : nodes;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const row = (line, tag) => element("tr", ...cells(line).map((cell) => element(tag, ...inline(cell))));
  const body = element("tbody", ...lines.slice(2).map((line) => row(line, "td")));
  const box = element("div", element("table", element("thead", row(lines[0], "th")), body));
  return Object.assign(box, { className: "wide-content", tabIndex: 0, role: "region", ariaLabel: "Table" });
}

function code(lines, language) {
  const box = element("pre", element("code", lines.join("\n")));
  return Object.assign(box, { tabIndex: 0, role: "region", ariaLabel: language ? `Code, ${language}` : "Code" });
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]), items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items.at(-1).push(line.slice(Math.min(indent.length + 2, line.length - line.trimStart().length)));
  }
  const ordered = /\d/.test(mark), node = element(ordered ? "ol" : "ul", ...items.map((item) => element("li", ...blocks(item, depth + 1))));
  if (ordered && parseInt(mark) !== 1) node.start = parseInt(mark);
  return node;
}

/** The elements of some lines. A construct that has only begun, as while an answer comes, is what it will be. */
function blocks(lines, depth = 0) {
  const nodes = [];
  for (let i = 0; i < lines.length; ) {
    const take = (test) => { const from = i; while (i < lines.length && test(lines[i])) i++; return lines.slice(from, i); };
    const line = lines[i], fence = FENCE.exec(line), heading = HEADING.exec(line);
    if (!line.trim()) i++;
    else if (fence) {
      i++;
      nodes.push(code(take((each) => !each.trim().startsWith(fence[1])), fence[2]));
      i++;
    } else if (heading) {
      i++;
      level = Math.min(level + 1, heading[1].length + 1, 6); // below the page's own, and none is left out
      nodes.push(element(`h${level}`, ...inline(heading[2])));
    } else if (RULE.test(line)) { i++; nodes.push(element("hr")); }
    else if (QUOTE.test(line) && depth < DEPTH)
      nodes.push(element("blockquote", ...blocks(take((each) => QUOTE.test(each)).map((each) => each.replace(QUOTE, "")), depth + 1)));
    else if (ITEM.test(line) && depth < DEPTH)
      nodes.push(list(take((each) => ITEM.test(each) || /^\s+\S/.test(each)), depth));
    else if (line.includes("|") && DELIMITER.test(lines[i + 1] ?? "")) nodes.push(table(take((each) => each.includes("|"))));
    else {
      const starts = (each) => !each.trim() || FENCE.test(each) || HEADING.test(each) || (depth < DEPTH && (QUOTE.test(each) || ITEM.test(each)));
      const text = [lines[i++], ...take((each) => !starts(each))];
      nodes.push(element("p", ...text.flatMap((each, n) => [...(n ? [element("br")] : []), ...inline(each)])));
    }
  }
  return nodes;
}

export function markdown(text) {
  level = 1;
  return blocks(text.split("\n"));
}
