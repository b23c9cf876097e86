/* Is this built with ThreadSanitizer? It knows neither fences nor streaming stores, so both have a stand-in then. */
#ifndef EPX_DEVICE_CPU_TSAN_H
#define EPX_DEVICE_CPU_TSAN_H

#if defined(__SANITIZE_THREAD__)
#define EPX__TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EPX__TSAN 1
#endif
#endif
#ifndef EPX__TSAN
#define EPX__TSAN 0
#endif

#endif
