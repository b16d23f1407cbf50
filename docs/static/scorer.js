// A section or a name that is called what was searched for comes before the pages that only contain the words.
// (The numbers of Sphinx; this object takes the place of its own.)
var Scorer = {
  score: ([document, title, anchor, description, score, file, kind]) => score + ({ title: 20, object: 10 }[kind] || 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
