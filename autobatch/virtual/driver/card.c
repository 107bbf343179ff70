// The cards this process sees and its contexts on them.
#include "card.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ending.h"
#include "memory.h"

static pthread_mutex_t tables = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t handlers = PTHREAD_ONCE_INIT;
static struct state *state;
static enum { UNTRIED, ABSENT, PRESENT } machine_status;
static int forked_with_context;  // as on a real GPU, a context does not survive a fork
static int visible[MAX_CARDS], visible_count;
static struct state_entry *entries[MAX_CARDS];  // by device ordinal; set once its context exists
static __thread int current;

void tables_lock(void) { pthread_mutex_lock(&tables); }
void tables_unlock(void) { pthread_mutex_unlock(&tables); }

// A forked child owns nothing: its bytes are its parent's. If the parent had no context, the child may make its own.
static void child_of_fork(void) {
  pthread_mutex_init(&tables, NULL);
  for (int i = 0; i < MAX_CARDS; i++) {
    forked_with_context |= entries[i] != NULL;
    entries[i] = NULL;
  }
}

static void install_handlers(void) { pthread_atfork(tables_lock, tables_unlock, child_of_fork); }

// One item of CUDA_VISIBLE_DEVICES: an index or a UUID, which may be shortened as long as it is unique.
static int find_card(const char *item, size_t length) {
  int found = -1;
  if (!strncmp(item, "GPU-", 4)) {
    for (uint32_t i = 0; i < state->card_count; i++) {
      if (strncmp(state->cards[i].uuid, item, length)) continue;
      if (found >= 0) return -1;
      found = (int)i;
    }
    return found;
  }
  char *end;
  long index = strtol(item, &end, 10);
  return end == item + length && length && index >= 0 && index < (long)state->card_count ? (int)index : -1;
}

// As CUDA documents it: the list ends at the first item that names no card; a card named twice leaves none at all.
static void read_visible(void) {
  const char *list = getenv("CUDA_VISIBLE_DEVICES");
  visible_count = 0;
  if (!list) {
    for (uint32_t i = 0; i < state->card_count; i++) visible[visible_count++] = (int)i;
    return;
  }
  while (*list) {
    list += strspn(list, " ");
    size_t length = strcspn(list, ", ");
    int card = find_card(list, length);
    if (card < 0) return;
    for (int i = 0; i < visible_count; i++) {
      if (visible[i] != card) continue;
      visible_count = 0;
      return;
    }
    visible[visible_count++] = card;
    list += length + strspn(list + length, " ");
    list += *list == ',';
  }
}

cudaError_t machine(void) {
  if (__atomic_load_n(&machine_status, __ATOMIC_ACQUIRE) == UNTRIED) {
    pthread_once(&handlers, install_handlers);
    tables_lock();
    if (machine_status == UNTRIED) {
      state = state_open();
      if (state) read_visible();
      __atomic_store_n(&machine_status, state ? PRESENT : ABSENT, __ATOMIC_RELEASE);
    }
    tables_unlock();
  }
  if (forked_with_context) return cudaErrorInitializationError;
  return machine_status == PRESENT && visible_count ? cudaSuccess : cudaErrorNoDevice;
}

int visible_cards(void) { return machine() == cudaSuccess ? visible_count : 0; }
uint32_t card_index(int device) { return (uint32_t)visible[device]; }
const struct state_card *card_of(int device) {
  return device >= 0 && device < visible_cards() ? &state->cards[visible[device]] : NULL;
}
struct state *card_state(void) { return machine_status == PRESENT ? state : NULL; }

int current_device(void) { return current; }
cudaError_t select_device(int device) {
  cudaError_t error = machine();
  if (error != cudaSuccess) return error;
  if (!card_of(device)) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}

int has_context(int device) {
  return device >= 0 && device < MAX_CARDS && __atomic_load_n(&entries[device], __ATOMIC_ACQUIRE) != NULL;
}

cudaError_t context(int device) {
  if (has_context(device)) return cudaSuccess;
  cudaError_t error = machine();
  if (error != cudaSuccess) return error;
  if (!card_of(device)) return cudaErrorInvalidDevice;
  tables_lock();
  if (!entries[device]) {
    struct state_entry *entry = NULL;
    ending_watch();
    error = memory_reserve();
    if (error == cudaSuccess && !state_join(state, card_index(device), &entry)) error = cudaErrorMemoryAllocation;
    __atomic_store_n(&entries[device], entry, __ATOMIC_RELEASE);
  }
  tables_unlock();
  return error;
}

cudaError_t current_context(void) { return context(current); }
int forked(void) { return forked_with_context; }
cudaError_t context_or_fork(void) { return forked() ? cudaSuccess : current_context(); }

int charge(int device, uint64_t bytes) { return has_context(device) && state_take(state, entries[device], bytes); }
void refund(int device, uint64_t bytes) {
  if (has_context(device)) state_give(state, entries[device], bytes);
}

void *fresh_handle(void) {
  static uintptr_t last = 0x10000;
  return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}

// Technical specifications per compute capability, CUDA programming guide. An unknown one is taken to be like the
// newest of its generation.
struct limits limits_of(const struct state_card *card) {
  int capability = card->capability_major * 10 + card->capability_minor;
  if (capability < 80) return (struct limits){65536, 65536, 1024, 16};
  if (capability == 80) return (struct limits){166912, 167936, 2048, 32};
  if (capability == 87) return (struct limits){166912, 167936, 1536, 16};
  if (capability < 89) return (struct limits){101376, 102400, 1536, 16};
  if (capability == 89 || capability >= 120) return (struct limits){101376, 102400, 1536, 24};
  return (struct limits){232448, 233472, 2048, 32};
}

// One card of each capability, in megabytes, bits and kilohertz as CUDA reports them. The H200's are measured, the
// others as they are published for these cards, those of the B200 and the GB10 unconfirmed. Others of a capability
// differ, and little depends on it: cuDNN's choice of plans on the memory's clock, Inductor's timing on the L2 cache.
static const struct {
  int capability;
  uint64_t from_bytes;
  struct chip chip;
} chips[] = {
    {75, 0, {4, 256, 1590000, 5001000}},               // T4
    {80, 0, {40, 5120, 1410000, 1215000}},             // A100, 40 GB
    {80, 60ull << 30, {40, 5120, 1410000, 1593000}},   // A100, 80 GB
    {86, 0, {6, 384, 1695000, 9751000}},               // RTX 3090
    {87, 0, {4, 256, 1300000, 3199000}},               // Jetson AGX Orin
    {89, 0, {72, 384, 2520000, 10501000}},             // RTX 4090
    {90, 0, {50, 5120, 1980000, 2619000}},             // H100
    {90, 100ull << 30, {60, 6016, 1980000, 3201000}},  // H200
    {100, 0, {126, 8192, 1965000, 3996000}},           // B200
    {120, 0, {96, 512, 2407000, 14001000}},            // RTX 5090
    {121, 0, {24, 256, 2418000, 4266000}},             // GB10
};

// The last that is not above the card.
struct chip chip_of(const struct state_card *card) {
  int capability = card->capability_major * 10 + card->capability_minor;
  struct chip found = chips[0].chip;
  for (size_t i = 0; i < sizeof chips / sizeof *chips; i++)
    if (chips[i].capability <= capability && chips[i].from_bytes <= card->total_bytes) found = chips[i].chip;
  return found;
}

// "GPU-01234567-89ab-..." as the 16 bytes it spells.
static void read_uuid(const char *text, char bytes[16]) {
  int digits = 0;
  memset(bytes, 0, 16);
  for (text += strncmp(text, "GPU-", 4) ? 0 : 4; *text && digits < 32; text++) {
    const char *found = strchr("0123456789abcdef", *text);
    if (!found) continue;
    bytes[digits / 2] = (char)(bytes[digits / 2] << 4 | (found - "0123456789abcdef"));
    digits++;
  }
}

void properties_of(int device, struct cudaDeviceProp *p) {
  const struct state_card *card = card_of(device);
  struct limits limits = limits_of(card);
  struct chip chip = chip_of(card);
  memset(p, 0, sizeof *p);
  memcpy(p->name, card->title, sizeof card->title);
  read_uuid(card->uuid, p->uuid.bytes);
  p->totalGlobalMem = card->total_bytes;
  p->major = card->capability_major;
  p->minor = card->capability_minor;
  p->multiProcessorCount = card->multiprocessors;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = (size_t)limits.shared_per_block;
  p->sharedMemPerMultiprocessor = (size_t)limits.shared_per_multiprocessor;
  p->reservedSharedMemPerBlock = card->capability_major >= 8 ? 1024 : 0;
  p->maxThreadsPerMultiProcessor = limits.threads_per_multiprocessor;
  p->maxBlocksPerMultiProcessor = limits.blocks_per_multiprocessor;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->l2CacheSize = chip.l2_mib << 20;
  p->memoryBusWidth = chip.bus_bits;
  p->concurrentKernels = p->cooperativeLaunch = 1;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = p->managedMemory = p->canMapHostMemory = 1;
  p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->memoryPoolsSupported = 1;
  p->pciBusID = (int)card_index(device) + 1;
}
