#ifndef AUTOBATCH_ENDING_H
#define AUTOBATCH_ENDING_H

// Lets a thread of torch's that outlives the interpreter wait instead of aborting the process.
void ending_watch(void);

#endif
