// A program that ends right after backward(), as it rarely does where kernels take their time.
//
// torch's thread for backward may then want the interpreter once more, to let go of what it held. Python 3.14 lets a
// thread that comes so late wait for ever; before, Python ends it with pthread_exit(), which a C++ destructor does not
// let pass, and the program aborts: "terminate called without an active exception" (pytorch/pytorch#117762). So such a
// thread waits here too, until the process is gone.
#define _GNU_SOURCE
#include "ending.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

typedef void (*handler)(void);
static handler others;
static void *(*exception)(void);

static void terminate(void) {
  char name[16] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  if (!strncmp(name, "pt_autograd", strlen("pt_autograd")) && !exception())
    for (;;) pause();
  others();
}

void ending_watch(void) {
  void *library = dlopen("libstdc++.so.6", RTLD_NOW | RTLD_NOLOAD);
  if (!library) return;
  exception = (void *(*)(void))dlsym(library, "__cxa_current_exception_type");
  handler (*set_terminate)(handler) = (handler(*)(handler))dlsym(library, "_ZSt13set_terminatePFvvE");
  if (!exception || !set_terminate) return;
  handler found = set_terminate(terminate);
  if (found != terminate) others = found;
}
