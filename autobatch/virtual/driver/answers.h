// The generated answers: every entry point of the installed headers that is not written out by hand.
#ifndef AUTOBATCH_ANSWERS_H
#define AUTOBATCH_ANSWERS_H

#include <stdint.h>

// Names a file that all processes count their uses of generated answers in, by number; without it nothing is counted.
#define CALLS_VARIABLE "AUTOBATCH_VIRTUAL_CALLS"

struct answer_name {
  const char *plain, *current;
};
// Generated, see autobatch/virtual/stubs.py: how many answers there are, and the driver's names that the headers map
// to a newer version, sorted.
extern const unsigned answer_count;
extern const struct answer_name answer_versions[];
extern const unsigned answer_version_count;

// Counts one use of the generated answer with this number, if uses are counted.
void answer_used(unsigned number);
// `name` as the installed headers define it.
const char *answer_current_name(const char *name);

#endif
